"""What is timed on a CPU, each beside its plain baseline: `make bench`, python -m tests.bench."""
