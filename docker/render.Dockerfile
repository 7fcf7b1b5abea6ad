# Renders on a GPU. The host has NVIDIA driver 580 or newer and the NVIDIA Container Toolkit.
#   docker build -f docker/render.Dockerfile --build-arg TORCH_INDEX=URL -t overcrank-render .
#   docker run --rm --gpus all -v "$PWD/store:/store" -v "$PWD:/work" overcrank-render render "a red circle moving right"
FROM python:3.11-slim-bookworm

# The driver's libraries are mounted from the host; CUDA's come with PyTorch's wheel.
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    OVERCRANK_HOME=/store HF_HOME=/store/huggingface \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /opt/overcrank
COPY . ./
# The index of PyTorch's wheels for CUDA 13.0, which pytorch.org names.
ARG TORCH_INDEX
RUN pip install --extra-index-url "$TORCH_INDEX" -c constraints.txt "torch==2.13.0+cu130" \
 && pip install -c constraints.txt ".[ray,s3]"

RUN useradd --create-home --uid 1000 renderer && install -d -o renderer /store /work
USER 1000
WORKDIR /work
VOLUME ["/store", "/work"]
ENTRYPOINT ["overcrank"]
CMD ["doctor"]
