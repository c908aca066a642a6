"""Cells: the equations of one unit and one step. Those that come with fused_lstm, and cell() for your own.

A layer of any of them is a fused_lstm.Recurrent.
"""

from .definition import Cell, cell
from .library import GREFF, cifg, fgr, gru, lstm, nfg, niaf, nig, noaf, nog, rnn_tanh, slstm, vanilla

__all__ = ["GREFF", "Cell", "cell", "cifg", "fgr", "gru", "lstm", "nfg", "niaf", "nig", "noaf", "nog", "rnn_tanh"]
__all__ += ["slstm", "vanilla"]
