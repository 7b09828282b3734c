"""What the host waits for, on any device."""

import contextlib
import warnings

import torch


@contextlib.contextmanager
def waits(device):
    """How often the host waits for the device meanwhile: the list has an entry for each."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as noted:
                warnings.simplefilter("always")
                yield noted
        finally:
            torch.cuda.set_sync_debug_mode("default")
    elif device.type == "cpu":
        yield []
    else:
        import accelerator

        with accelerator.waits() as noted:
            yield noted
