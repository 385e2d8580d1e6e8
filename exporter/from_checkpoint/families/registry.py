"""Registry of the model families: every name that `stepcell export --family` takes."""

from __future__ import annotations

from stepcell.errors import UsageError
from stepcell.exporter.from_checkpoint.families import stepcell_models, torch_rnn
from stepcell.exporter.from_checkpoint.families.e2vid import firenet as e2vid_firenet
from stepcell.exporter.from_checkpoint.families.e2vid import recurrent as e2vid_recurrent
from stepcell.exporter.from_checkpoint.families.family import Family
from stepcell.exporter.from_checkpoint.families.heads import conv2d_lstm_heads, pooled_gru_heads
from stepcell.exporter.from_checkpoint.families.openeb import convrnn as openeb_convrnn
from stepcell.exporter.from_checkpoint.families.openeb import event_to_video as openeb_event_to_video
from stepcell.exporter.from_checkpoint.families.openeb import firenet as openeb_firenet
from stepcell.exporter.from_checkpoint.families.raft import convgru as raft_convgru
from stepcell.exporter.from_checkpoint.families.raft import stereo_convgru as raft_stereo_convgru
from stepcell.exporter.from_checkpoint.families.raft import update_block as raft_update_block
from stepcell.exporter.from_checkpoint.families.rvm import convgru as rvm_convgru
from stepcell.exporter.from_checkpoint.families.rvm import decoder as rvm_decoder
from stepcell.exporter.from_checkpoint.families.rvm import full as rvm_full
from stepcell.exporter.from_checkpoint.families.single_cells import (
    jhhuang96_convrnn,
    rvt_dws_convlstm,
    skillful_convgru,
)
from stepcell.exporter.from_checkpoint.families.stacks import (
    aserdega,
    automan000_peephole_convlstm,
    happyjin_convgru,
    jacobkimmel_convgru,
    mangrick_gru_rcn,
    ndrplz_convlstm,
)
from stepcell.renamed_families import current_name

__all__ = ["FAMILIES", "PUBLISHED", "find_family"]

# stepcell's own models and torch's layers.
_GENERIC = (
    stepcell_models.DENOISER,
    stepcell_models.CONV_GRU,
    stepcell_models.CONV_LSTM,
    torch_rnn.GRU,
    torch_rnn.LSTM,
)
# Models published by others; each has golden cases. A new family is registered here.
PUBLISHED = (
    e2vid_firenet.FAMILY,
    e2vid_recurrent.FAMILY,
    openeb_convrnn.FAMILY,
    openeb_event_to_video.FAMILY,
    openeb_firenet.FAMILY,
    raft_convgru.CONV_GRU,
    raft_convgru.SEP_CONV_GRU,
    raft_stereo_convgru.FAMILY,
    raft_update_block.FAMILY,
    rvm_convgru.FAMILY,
    rvm_decoder.FAMILY,
    rvm_full.FAMILY,
    aserdega.CONV_GRU,
    aserdega.CONV_LSTM,
    automan000_peephole_convlstm.FAMILY,
    happyjin_convgru.FAMILY,
    jacobkimmel_convgru.FAMILY,
    mangrick_gru_rcn.FAMILY,
    ndrplz_convlstm.FAMILY,
    jhhuang96_convrnn.FAMILY,
    rvt_dws_convlstm.FAMILY,
    skillful_convgru.FAMILY,
    conv2d_lstm_heads.FAMILY,
    pooled_gru_heads.FAMILY,
)
FAMILIES: dict[str, Family] = {family.name: family for family in (*_GENERIC, *PUBLISHED)}


def find_family(name: str) -> Family:
    """Family of this name or former name.

    Raises:
        UsageError: there is none.
    """
    family = FAMILIES.get(current_name(name))
    if family is None:
        raise UsageError(f"--family {name}: unknown", hint="families: " + ", ".join(FAMILIES))
    return family
