"""Small standard model families, each with its own search space."""

from selftune.search._shape import Shape
from selftune.search.families._base import AbstractFamily
from selftune.search.families._periodic import Periodic
from selftune.search.families.cnn import CNN
from selftune.search.families.gan import GAN, energy_distance
from selftune.search.families.mlp import MLP
from selftune.search.families.recurrent import GRU, LSTM, RNN
from selftune.search.families.resnet import ResNet
from selftune.search.families.transformer import Transformer

__all__ = [
    "CNN",
    "GAN",
    "GRU",
    "LSTM",
    "MLP",
    "RNN",
    "AbstractFamily",
    "Periodic",
    "ResNet",
    "Transformer",
    "auto",
    "energy_distance",
]

AUTO: dict[str, tuple[type[AbstractFamily], ...]] = {
    "table": (MLP, ResNet),
    "images": (CNN, ResNet, MLP),
    "volumes": (MLP,),
    "sequence": (LSTM, GRU, Transformer),
    "words": (LSTM, GRU, Transformer),
}


def auto(shape: Shape) -> dict[str, AbstractFamily]:
    """Families that can be trained on a data set, by name.

    Examples:
        >>> list(auto(Shape((1, 28, 28), 10, "classification")))
        ['cnn', 'resnet', 'mlp']
    """
    return {kind.__name__.lower(): kind(shape) for kind in AUTO[shape.kind]}
