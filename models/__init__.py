"""Torch modules: canonical cells, stacks of them, the step-model protocol, sequence helpers.

Names load on first use.
"""

from typing import TYPE_CHECKING

from stepcell.lazy import lazy_names

if TYPE_CHECKING:
    from stepcell.models.cells import ConvGRUCell, ConvLSTMCell, conv_gru, conv_lstm
    from stepcell.models.checkpoint_writer import save_checkpoint
    from stepcell.models.sequence import batch_to_time, seq_wise, time_to_batch
    from stepcell.models.stack import CellStack, DenseStack, GRUCell, LSTMCell, conv_gru_stack, conv_lstm_stack
    from stepcell.models.step import StepModule, initial_states, is_step_module, run_sequence

__all__ = [
    "CellStack",
    "ConvGRUCell",
    "ConvLSTMCell",
    "DenseStack",
    "GRUCell",
    "LSTMCell",
    "StepModule",
    "batch_to_time",
    "conv_gru",
    "conv_gru_stack",
    "conv_lstm",
    "conv_lstm_stack",
    "initial_states",
    "is_step_module",
    "run_sequence",
    "save_checkpoint",
    "seq_wise",
    "time_to_batch",
]

_NAMES = {
    "cells": "ConvGRUCell ConvLSTMCell conv_gru conv_lstm",
    "checkpoint_writer": "save_checkpoint",
    "sequence": "batch_to_time seq_wise time_to_batch",
    "stack": "CellStack DenseStack GRUCell LSTMCell conv_gru_stack conv_lstm_stack",
    "step": "StepModule initial_states is_step_module run_sequence",
}
__getattr__, __dir__ = lazy_names(__name__, _NAMES)
