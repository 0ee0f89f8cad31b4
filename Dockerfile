# spade with all that the experiments need. CPU:  docker build -t spade .
# A GPU:  docker build -t spade --build-arg TORCH=cu130 .   and   docker run --gpus all spade
# Results stay in a mounted folder:  docker run -v "$PWD/outputs:/spade/outputs" spade make demo
FROM python:3.11-slim
ARG TORCH=cpu
RUN apt-get update && apt-get install -y --no-install-recommends git make util-linux && rm -rf /var/lib/apt/lists/*
WORKDIR /spade
COPY . .
RUN make install TORCH=$TORCH && rm -rf /root/.cache/pip
ENV PATH=/spade/.venv/bin:$PATH
CMD ["make", "demo"]
