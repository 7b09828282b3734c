"""
`hf-oto` on the command line: each command parses, calls a wing and prints. It may import everything, and a command's
file only what that command needs.
"""
