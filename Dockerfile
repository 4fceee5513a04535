# l2m_jax for NVIDIA GPUs. CUDA and cuDNN come with JAX's wheels; the host needs its driver and the container toolkit.
#
#   docker build -t l2m_jax .
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" -v "$PWD:/work" l2m_jax \
#       train --config quickstart.py --workdir runs/quickstart
FROM python:3.12-slim

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /src
# The dependencies are a layer of their own, which a change of the code leaves as it is.
COPY pyproject.toml README.md LICENSE ./
RUN mkdir l2m_jax \
    && echo '__version__ = "0"' > l2m_jax/__init__.py \
    && pip install '.[cuda12,gguf,judge,tensorboard]' \
    && pip uninstall --yes l2m_jax

COPY l2m_jax l2m_jax
RUN pip install --no-deps . \
    && useradd --create-home --uid 1000 l2m \
    && mkdir /work \
    && chown l2m /work

# Caches of compiled programs and models lie in the home, which any user of `docker run --user` may write.
RUN chmod 777 /home/l2m
ENV HOME=/home/l2m
USER l2m
WORKDIR /work
ENTRYPOINT ["l2m"]
CMD ["--help"]
