"""Programs that others wrote around nn.LSTM: swapped in place they train to the same losses; and libraries that ask for
its class.

A codec's residual stacks, a language model on packed rows of uneven length, and a policy that runs step by step.
"""

import pytest
import torch
from torch import nn

import fused_lstm


def encodec():
    """transformers: the codec's encoder and decoder, each with a residual two-layer LSTM over frames of sound."""
    from transformers import EncodecConfig, EncodecModel

    config = EncodecConfig(num_filters=2, hidden_size=16, codebook_size=8, codebook_dim=16, upsampling_ratios=[4, 2])
    # In float64: under weight norm a convolution of one weight has a gradient of rounding alone, which Adam follows.
    model, sound = EncodecModel(config).double(), torch.randn(2, 1, 160, dtype=torch.float64)

    def loss():
        return (model.decoder(model.encoder(sound)) - sound).abs().mean()

    return model, 2, lambda: train(model, loss)


def character_model():
    """stanza: a character language model, which packs its rows and learns its initial states."""
    from stanza.models.common.char_model import CharacterLanguageModel
    from stanza.models.common.vocab import CharVocab

    args = {"char_emb_dim": 5, "char_hidden_dim": 20, "char_num_layers": 2, "char_rec_dropout": 0, "char_dropout": 0.25}
    lengths = [9, 6, 6, 1]
    model = CharacterLanguageModel(args, {"char": CharVocab([["abcdef", "fedcba"]])})
    characters = torch.randint(len(model.char_vocab()), (4, 10))

    def loss():
        decoded = model(characters[:, :-1], lengths)[2]
        rows = zip(decoded, characters[:, 1:], lengths, strict=True)
        return sum(torch.nn.functional.cross_entropy(row[:n], next[:n]) for row, next, n in rows)

    return model, 1, lambda: train(model, loss)


def policy():
    """sb3-contrib: proximal policy optimisation with one LSTM of the actor and one of the critic."""
    import gymnasium
    from sb3_contrib import RecurrentPPO

    sizes = {"n_steps": 16, "batch_size": 8, "n_epochs": 2, "policy_kwargs": {"lstm_hidden_size": 20}}
    learner = RecurrentPPO("MlpLstmPolicy", gymnasium.make("CartPole-v1"), seed=3, device="cpu", **sizes)

    def run():
        losses = []
        for _ in range(3):
            learner.learn(16, log_interval=100)
            losses.append(learner.logger.name_to_value["train/loss"])
        return losses

    return learner.policy, 2, run


def train(model, loss):
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


@pytest.mark.parametrize("program", [encodec, character_model, policy])
def test_trains_to_the_same_losses(program):
    runs = []
    for swapped in (False, True):
        torch.manual_seed(0)
        model, count, run = program()
        if swapped:
            assert fused_lstm.swap(model) == count
        runs.append((torch.tensor(run()), dict(model.named_parameters())))
    assert len(set(runs[0][0].tolist())) == len(runs[0][0]), "it does not train"
    torch.testing.assert_close(runs[1][0], runs[0][0])
    torch.testing.assert_close(runs[1][1], runs[0][1], rtol=1e-3, atol=1e-4)


# Libraries that ask for nn.LSTM, which ours is not: swapped after them, or told of the class


class Model(nn.Module):
    def __init__(self, cls=nn.LSTM):
        super().__init__()
        self.lstm, self.out = cls(4, 6, batch_first=True), nn.Linear(6, 1)

    def forward(self, x):
        return self.out(self.lstm(x)[0])


def thop_counts(model, **options):
    from thop import profile

    return profile(model, inputs=(torch.randn(2, 3, 4),), verbose=False, **options)


def ptflops_counts(model, **options):
    from ptflops import get_model_complexity_info

    return get_model_complexity_info(model, (3, 4), as_strings=False, print_per_layer_stat=False, **options)


@pytest.mark.parametrize("count", [thop_counts, ptflops_counts])
def test_a_model_is_swapped_after_it_was_profiled(count):
    model, x = Model(), torch.randn(2, 3, 4)
    counts, before = count(model), model(x)
    assert fused_lstm.swap(model) == 1
    torch.testing.assert_close(model(x), before)
    assert all(part > 0 for part in counts)


def test_thop_counts_ours_when_it_is_told():
    from thop.rnn_hooks import count_lstm

    told = thop_counts(Model(fused_lstm.LSTM), custom_ops={fused_lstm.LSTM: count_lstm})
    assert told == thop_counts(Model()) != thop_counts(Model(fused_lstm.LSTM))


def test_transformers_makes_absent_weights_before_the_swap(tmp_path):
    """from_pretrained() fills a module that the checkpoint lacks only if it knows its class."""
    from transformers import PretrainedConfig, PreTrainedModel

    class Config(PretrainedConfig):
        model_type = "small"

    class Small(PreTrainedModel):
        config_class = Config

        def __init__(self, config):
            super().__init__(config)
            self.inner = nn.Linear(4, 4)
            self.post_init()

    class Large(Small):
        def __init__(self, config):
            super().__init__(config)
            self.lstm = nn.LSTM(4, 6)
            self.post_init()

    Small(Config()).save_pretrained(tmp_path)
    model = Large.from_pretrained(tmp_path)
    assert fused_lstm.swap(model) == 1
    for name, weight in model.lstm.named_parameters():
        assert weight.abs().max() < 1 and ("bias" in name or weight.std() > 0.1), name


@pytest.mark.parametrize("is_init", [False, True], ids=["one trajectory a row", "trajectories that begin within"])
def test_torchrl(is_init):
    """It packs the trajectories for nn.LSTM, and gives a mask to all others."""
    from tensordict import TensorDict
    from torchrl.modules import LSTMModule, set_recurrent_mode

    lstm = nn.LSTM(4, 6, batch_first=True)
    keys = {"in_keys": ["x", "h", "c"], "out_keys": ["y", ("next", "h"), ("next", "c")]}
    begins = torch.zeros(2, 5, 1, dtype=torch.bool)
    begins[0, 2] = is_init
    data = {"x": torch.randn(2, 5, 4), "is_init": begins, "h": torch.randn(2, 5, 1, 6), "c": torch.randn(2, 5, 1, 6)}
    results = []
    for swapped in (False, True):
        module = LSTMModule(lstm=lstm, **keys)
        if swapped:
            assert fused_lstm.swap(module) == 1
        with set_recurrent_mode(True):
            results.append(module(TensorDict(data, [2, 5])))
    for key in keys["out_keys"]:
        torch.testing.assert_close(results[1][key], results[0][key])
