"""The expensive operators of our networks, each behind one signature, whatever computes it.

kernels/operators.py chooses who does. reference.py defines what each computes, in plain PyTorch.
The files called as the operators are compute the same in Triton; they are imported only where they
are chosen, so that this folder works where Triton isn't installed. cards.py and constants.py are
numbers, and need not even PyTorch.

    python -m kernels.audit      what each kernel takes of each GPU, compiled on any machine
    python -m kernels.schedule   the order of attention's tiles, and what a model says of it
    python -m kernels.selfcheck  on a GPU: kernels against reference, in seconds
    python -m kernels.bench      on a GPU: kernels against PyTorch's own, timed
"""
