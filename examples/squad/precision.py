"""bfloat16 where a device is made for it: elsewhere it takes many times as long as float32."""

import torch
from processes import console


def made_for_bf16(device: str | torch.device = "cpu") -> bool:
    """
    Whether a device has instructions for products of bfloat16 numbers. Without them PyTorch computes such products one
    by one: on a processor with AVX2 alone, 56 times as long as in float32.
    """
    kind = torch.device(device).type
    if kind == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def choose_bf16(wanted: bool | None = None, device: str | torch.device = "cpu") -> bool:
    """What is wanted, or else what the device is made for; the choice is printed."""
    able = made_for_bf16(device)
    chosen = able if wanted is None else wanted
    reason = "has" if able else "has no"
    console.print(
        f"Training in {'bfloat16' if chosen else 'float32'}: {'this processor' if str(device) == 'cpu' else device} "
        f"{reason} instructions for bfloat16{', as asked' if wanted is not None else ''}.",
        highlight=False,
    )
    return chosen
