"""Serving: streams of many clients on one step loop, behind NVIDIA Triton Inference Server. No server of its own."""
