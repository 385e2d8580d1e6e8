# The demonstration on x86-64, without a GPU:
#   docker build --tag stepcell . && docker run --rm --volume "$PWD/demo-output:/stepcell/demo-output" stepcell
FROM python:3.12-slim-bookworm

WORKDIR /stepcell
COPY . .

# An index with CPU wheels of torch makes the image several GB smaller: --build-arg PIP_EXTRA_INDEX_URL=...
ARG PIP_EXTRA_INDEX_URL
RUN PIP_NO_CACHE_DIR=1 python tools/install_pinned.py '.[demo]' \
    && useradd --uid 1000 --create-home stepcell \
    && install --directory --owner=1000 demo-output

USER 1000
CMD ["python", "-m", "tools.demo"]
