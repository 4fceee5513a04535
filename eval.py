"""`python eval.py --model FOLDER --output runs/scores`, the same as `l2m eval`."""

from l2m_jax.cli.eval import main

if __name__ == "__main__":
    main()
