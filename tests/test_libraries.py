"""Programs that others wrote around nn.LSTM: swapped in place they train to the same losses.

A codec's residual stacks, a language model on packed rows of uneven length, and a policy that runs step by step.
"""

import pytest
import torch

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
