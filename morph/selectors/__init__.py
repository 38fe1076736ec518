"""How to score layers, KV heads and heads: one file per selector."""
