"""Laid-eval's command line, where accelerate is told that the CPU is an accelerator.

A fake, and the only one in sharded training's tests: accelerate passes its FSDP settings on for accelerators alone.
What shards, gathers and reduces (torch's FSDP 2 on gloo) is real.
"""

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from laid_eval.cli import main

_plain = AcceleratorState.__init__


def _with_shards(self, *args, fsdp_plugin=None, **kwargs):
    _plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


if __name__ == "__main__":
    AcceleratorState.__init__ = _with_shards
    main()
