"""Measures fused_lstm.LSTM against torch.nn.LSTM: `python -m bench.run`, from the root of the repository."""
