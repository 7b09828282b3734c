"""
What is done with the small model: timing, ONNX, answers, scores. It may import `report`, `hspg`, `models` and
`config`.
"""
