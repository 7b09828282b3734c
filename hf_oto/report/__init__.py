"""
What was kept, layer by layer: numbers, table, pictures, card. It may import `hspg`, `models` and `config`.
"""
