"""Attention-like operators as pure functions.

Letters, everywhere in morph: B batch, T query tokens, S key tokens, H query heads, G KV heads,
K q/k head size, V value head size, D hidden size, W window, C chunk, N packed sequences, L layers.
One layout, always: `[B, T, H, K]`.

A kernel file has `reference` (slow, obvious, any dtype), `forward` (the fastest supported path),
`unsupported` (why a fast path cannot run, or an empty string), `example`, `flops` and `bytes`.
"""
