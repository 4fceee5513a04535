"""`python train.py --config configs/quickstart.py --workdir runs/quickstart`, the same as `l2m train`."""

from l2m_jax.cli.train import main

if __name__ == "__main__":
    main()
