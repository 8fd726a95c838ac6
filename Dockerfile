# PromptRL on an NVIDIA GPU. Not built here.
#   docker build -t promptrl . && docker run --gpus all -v "$PWD/runs:/work/runs" promptrl quickstart
FROM python:3.11-slim

# gcc for torch.compile's kernels; the others for the OCR engine's OpenCV.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev libgl1 libglib2.0-0 && rm -rf /var/lib/apt/lists/*

# PyTorch's wheels for Linux bring CUDA along; the host needs the driver and the NVIDIA Container Toolkit.
WORKDIR /src
COPY . .
RUN pip install --no-cache-dir -c constraints.txt ".[ocr,server,data,wandb]"

WORKDIR /work
ENTRYPOINT ["promptrl"]
CMD ["--help"]
