# Builds engines: no GPU and no driver. One image for the head and the workers of a Ray cluster.
#   docker build -f docker/build.Dockerfile --build-arg TORCH_INDEX=URL -t overcrank-build .
FROM python:3.11-slim-bookworm

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 OVERCRANK_HOME=/store
WORKDIR /opt/overcrank
COPY . ./
# PyTorch for CPU: its build with CUDA has 5 GB more, which building does not use.
# TORCH_INDEX: the index of its CPU wheels, which pytorch.org names.
ARG TORCH_INDEX
RUN pip install --extra-index-url "$TORCH_INDEX" -c constraints.txt "torch==2.13.0+cpu" \
 && pip install -c constraints.txt ".[ray,s3]"

RUN useradd --create-home --uid 1000 builder && install -d -o builder /store
USER 1000
WORKDIR /home/builder
VOLUME /store
ENTRYPOINT ["overcrank"]
CMD ["--help"]
