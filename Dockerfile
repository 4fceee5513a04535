# l2m_jax for NVIDIA GPUs. CUDA and cuDNN come with JAX's wheels; the host needs its driver and the container toolkit.
#
#   docker build -t l2m_jax .
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" -v "$PWD:/work" l2m_jax \
#       train --config run.yaml --workdir runs/mine
FROM python:3.12-slim

# Any user of `docker run --user` may write to this home, where models and compiled programs are cached.
ENV HOME=/tmp \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_VISIBLE_DEVICES=all \
    PYTHONUNBUFFERED=1

# The dependencies are a layer of their own, which a change of the code leaves as it is. Their versions are in
# pyproject.toml.
WORKDIR /src
COPY pyproject.toml ./
# hadolint ignore=DL3013
RUN touch README.md LICENSE \
    && mkdir l2m_jax \
    && echo '__version__ = "0"' > l2m_jax/__init__.py \
    && pip install --no-cache-dir '.[cuda12,gguf,judge,tensorboard]'

COPY README.md LICENSE ./
COPY l2m_jax l2m_jax
RUN pip install --no-cache-dir --no-deps --force-reinstall . \
    && useradd --no-create-home --uid 1000 l2m \
    && install --directory --owner=l2m /work

USER 1000
WORKDIR /work
ENTRYPOINT ["l2m"]
CMD ["--help"]
