"""What a GPU should do with this program, and does: `make gpu-check`, python -m tests.gpucheck."""
