"""
`OTOTrainer` and what only training needs: refusals, distillation, checkpoints, the Hub. It may import `report`,
`hspg`, `models` and `config`.
"""
