"""The transformer. Every tensor name carries its axes as a suffix of these letters:

B batch            L query length     S key length       V vocabulary
D model dim        N query heads      K key/value heads  G = N // K
H head dim         F mlp dim          E experts          R low rank
"""
