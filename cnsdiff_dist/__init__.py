"""A distributed trainer for recommender embeddings that hold up out of distribution (CNSDiff).

Data flows one way through the packages: ``prepare`` writes a dataset; ``data`` streams it;
``models`` encodes what a step looks up in the tables of ``distributed``; ``samplers`` makes
negatives and ``objectives`` ranks them; ``training`` takes the steps; ``checkpoint`` keeps them;
``inference`` opens what was trained, ``evaluation`` measures it, ``comparison`` compares methods.
Start at ``training/step.py``.

Tensors and arrays are named by their shapes, one letter a dimension:

=====  =======================================================================================
``B``  rows of the batch at hand on this rank; ``b`` some of them
``D``  embedding dimension
``U``  users, and ``I`` items, of the whole catalogue
``R``  table rows that this rank owns
``M``  candidates that are looked up for a row
``N``  negatives of a row; ``P`` vectors in the pool of a group, ``S`` the generated ones of them
``G``  groups of a step, ``W`` rows of a group: B = G x W, one group per canonical stream
``L``  noise levels; ``T`` diffusion steps
``V``  nodes of a step's block; ``v`` nodes of one hop; ``Q`` nodes whose output is asked for
``K``  length of a top-K list
``E``  environments, that is, popularity buckets
``A``  users of all ranks in one round of ranking
``C``  columns (items, or rows of a piece) that are handled at a time
``O``  rows of the other side of the graph
``F``  latent factors or subspaces
``n``  entries of a list of no other name
=====  =======================================================================================
"""
