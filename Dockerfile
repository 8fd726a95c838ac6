# PromptRL on an NVIDIA GPU. Not built here: there was no network to pull images from.
#   docker build -t promptrl . && docker run --gpus all -v "$PWD/runs:/work/runs" promptrl quickstart
FROM python:3.11-slim

# PyTorch's wheels for Linux bring CUDA along; the host needs the driver and the NVIDIA Container Toolkit.
WORKDIR /src
COPY . .
RUN pip install --no-cache-dir -c constraints.txt ".[ocr,server,data]"

WORKDIR /work
ENTRYPOINT ["promptrl"]
CMD ["--help"]
