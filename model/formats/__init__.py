"""Formats of GPT-2's weights that others defined; model/convert.py moves weights between them.

    tensors.py    GPT-2's tensors by OpenAI's names, and whether a model or a file has just these
    hf.py         to and from a Hugging Face folder
    hub.py        a folder on the Hub: its commit, its size, its files here
    llmc.py       to and from llm.c's model file
    nanogpt.py    out of nanoGPT's and build-nanogpt's checkpoints
    pickles.py    what torch.save wrote, read without running it
    foreign.py    what to do with weights that were named as a checkpoint and are none
"""
