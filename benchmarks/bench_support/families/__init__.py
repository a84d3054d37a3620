"""Small models of seven families that train here in seconds, on real text, real images and a synthetic graph.

Each module is a target (``build_model``, ``build_batches``, ``compute_loss``) with a ``validation_loss``; ``SEED``
decides its weights and the order of its data, ``WIDTH`` its size, ``TUNED`` whether tables and heads learn ten times
faster. They come from the environment, ``MEMADVISE_SEED``, ``MEMADVISE_WIDTH`` and ``MEMADVISE_TUNED``, so that a file
names one model in every process.

No batch comes twice, so that nothing is learned by heart: a method that damps the updates would look better than AdamW
for holding back. Text is long enough; digits come under noise, and the words of the papers are drawn anew.
"""
