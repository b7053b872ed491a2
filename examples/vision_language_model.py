"""A small vision-language model for vision_language.py: vision encoder, projector, and DynMoE's decoder."""

from collections.abc import Sequence

import scenes
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.config import Config
from dynmoe.engines.deepspeed import DeepSpeedMoELayer
from dynmoe.model import Decoder
from dynmoe.moe import MoEContext
from dynmoe.moe.experts import SwiGLU

PATCH = 4
ROWS = scenes.SIDE // PATCH
PATCHES = ROWS**2
TOKENS = scenes.GRID**2  # of a picture, in the decoder: 2 × 2 patches make one
WORDS = ["<pad>", *scenes.vocabulary()]
IDS = {word: number for number, word in enumerate(WORDS)}
IGNORED = -100  # a label without a loss


def encode(text: str) -> list[int]:
    return [IDS[word] for word in text.split()]


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """The rows as one tensor [B, S], filled up on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def never_together() -> Tensor:
    """Colours and shapes that no training picture has in one thing, bool [colours, shapes], counted from 1."""
    unseen = torch.zeros(len(scenes.COLOURS) + 1, len(scenes.SHAPES) + 1, dtype=torch.bool)
    for colour, shape in scenes.HELD_OUT:
        unseen[1 + list(scenes.COLOURS).index(colour), 1 + list(scenes.SHAPES).index(shape)] = True
    return unseen


def places(hidden: int) -> Tensor:
    """Fixed codes of the places of patches, sines and cosines of row and column, [P, D] (arXiv 2205.01580)."""
    frequency = 100.0 ** -torch.linspace(0, 1, hidden // 4)
    angle_RF = torch.arange(ROWS)[:, None] * frequency
    code_RF = torch.cat([angle_RF.sin(), angle_RF.cos()], dim=1)
    rows, columns = torch.arange(PATCHES) // ROWS, torch.arange(PATCHES) % ROWS
    return 0.2 * torch.cat([code_RF[rows], code_RF[columns]], dim=1)  # small beside the patch


class Block(nn.Module):
    """Attention over all patches, then a dense layer."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        hidden = config.model.hidden
        self.attention_norm = nn.LayerNorm(hidden)
        self.ffn_norm = nn.LayerNorm(hidden)
        self.attention = nn.MultiheadAttention(hidden, config.model.heads, batch_first=True)
        self.ffn = SwiGLU(config.model, config.model.ffn_hidden, config.train.seed, f"encoder.{layer}")

    def forward(self, x_BPD: Tensor) -> Tensor:
        normed_BPD = self.attention_norm(x_BPD)
        x_BPD = x_BPD + self.attention(normed_BPD, normed_BPD, normed_BPD, need_weights=False)[0]
        return x_BPD + self.ffn(self.ffn_norm(x_BPD))


class Encoder(nn.Module):
    """A vision transformer whose features are trained by naming the colour and the shape in each cell.

    Colours are named from one half of the features, and shapes from the other, which is taken from the picture in grey.
    What it says of a shape therefore hardly depends on the colour.
    """

    def __init__(self, config: Config, layers: int = 1) -> None:
        super().__init__()
        hidden = config.model.hidden
        self.embed = nn.Linear(3 * PATCH**2, hidden)
        self.register_buffer("places", places(hidden))
        self.blocks = nn.Sequential(*(Block(config, layer) for layer in range(layers)))
        self.norm = nn.LayerNorm(hidden)
        self.colour = nn.Linear(hidden // 2, len(scenes.COLOURS) + 1)
        self.shape = nn.Linear(hidden // 2, len(scenes.SHAPES) + 1)
        self.register_buffer("never_together", never_together())

    def see(self, pictures_B3HW: Tensor) -> Tensor:
        """A vector for each cell, the mean of its 2 × 2 patches, [B, C, D]."""
        patches_BPp = F.unfold(pictures_B3HW, PATCH, stride=PATCH).transpose(1, 2)
        x_BPD = self.norm(self.blocks(self.embed(patches_BPp) + self.places))
        x_BDRR = x_BPD.transpose(1, 2).unflatten(2, (ROWS, ROWS))
        return F.avg_pool2d(x_BDRR, ROWS // scenes.GRID).flatten(2).transpose(1, 2)

    def features(self, pictures_B3HW: Tensor) -> Tensor:
        """[B, C, D]: half of the features from the picture, half from the picture in grey."""
        greys_B3HW = pictures_B3HW.mean(dim=1, keepdim=True).expand_as(pictures_B3HW)
        half = self.colour.in_features
        return torch.cat([self.see(pictures_B3HW)[..., :half], self.see(greys_B3HW)[..., half:]], dim=2)

    def names(self, pictures_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the colour and of the shape in each cell, [B, C, names], each from its half of the features."""
        colours_BCd, shapes_BCd = self.features(pictures_B3HW).chunk(2, dim=2)
        return self.colour(colours_BCd), self.shape(shapes_BCd)

    def forward(self, pictures_B3HW: Tensor, names_BC2: Tensor) -> Tensor:
        """Cross-entropy of both names.

        Names that never occur together in training are left out of each other's softmax. Otherwise the encoder learns
        that what is red is no square.
        """
        colours, shapes = self.names(pictures_B3HW)
        colour_BC, shape_BC = names_BC2.unbind(dim=2)
        colours = colours.masked_fill(self.never_together.t()[shape_BC], -torch.inf)
        shapes = shapes.masked_fill(self.never_together[colour_BC], -torch.inf)
        both = ((colours, colour_BC), (shapes, shape_BC))
        return sum(F.cross_entropy(logits.flatten(0, 1), own.flatten()) for logits, own in both)


class Projector(nn.Module):
    """From features of cells to embeddings of the decoder: linear, plus a learned embedding of the place."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, hidden)
        self.places_CD = nn.Parameter(0.5 * torch.randn(TOKENS, hidden))

    def forward(self, features_BCD: Tensor) -> Tensor:
        return self.linear(features_BCD) + self.places_CD


class VisionLanguageModel(nn.Module):
    """Cells of a picture, projected to the width of the decoder, and then words."""

    def __init__(self, config: Config, context: MoEContext, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = Projector(config.model.hidden)
        self.decoder = Decoder(config.model, len(WORDS), config.train.seed, context, make_moe=DeepSpeedMoELayer)

    def logits(self, pictures_B3HW: Tensor | None, tokens_BS: Tensor, wanted_BS: Tensor) -> Tensor:
        """Logits of the word after each of the wanted positions, [wanted, words]; without pictures, of text alone."""
        prefix_BCD = None
        if pictures_B3HW is not None:
            with torch.no_grad():  # always frozen
                features_BCD = self.encoder.features(pictures_B3HW)
            prefix_BCD = self.projector(features_BCD)
        hidden_BSD = self.decoder.hidden(tokens_BS, prefix_BPD=prefix_BCD)[:, -tokens_BS.shape[1] :]
        return F.linear(hidden_BSD[wanted_BS], self.decoder.output_weight_VD)

    def forward(self, pictures_B3HW: Tensor | None, tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
        """Mean cross-entropy of the labels that are not ignored."""
        wanted_BS = labels_BS != IGNORED
        return F.cross_entropy(self.logits(pictures_B3HW, tokens_BS, wanted_BS), labels_BS[wanted_BS])
