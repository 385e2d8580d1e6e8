"""What the device needs: the step loop, its back ends, streams and statistics. No torch, no triton."""

from stepcell.runtime.loop.step_loop import StepLoop

__all__ = ["StepLoop"]
