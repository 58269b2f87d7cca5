"""The special function unit's EX2 and RCP, bit for bit (`docs/arithmetic.md`, section 4).

The unit is a piecewise quadratic (Oberman and Siu, "A High-Performance Area-Efficient Multifunction
Interpolator", ARITH 2005). The leading 6 (EX2) or 7 (RCP) of the 23 fraction bits choose a row
(C0, C1, C2); with x, the other bits, the result is

    (C0 * 2^13 + C1 * x + C2 * square(x) + bias) >> 15.

`tools/tables/fit_mufu.py` derives the integers at the end of this file from recorded results and proves that they
reproduce all 2^23 of each table. Everything here is integer arithmetic on the bits, so no rounding,
subnormal or fast-math mode of the machine can touch it.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from mxfp4ref._compiler import uncompiled
from mxfp4ref._validate import check_tensor

__all__ = ["TANH_FIRST", "TANH_ROWS", "TANH_SEGMENTS", "TANH_UNIT", "ex2", "rcp", "tanh"]

_INF = 0x7F800000
_NAN = 0x7FFFFFFF
_MIN_NORMAL = 0x00800000
_FRACTION = 0x007FFFFF


@uncompiled
def ex2(x: Tensor) -> Tensor:
    """ex2.approx.ftz.f32: 2^x, elementwise.

    Args:
        x: `[...]` float32, any shape and device; subnormals count as zeros.

    Returns:
        `[...]` float32, new: never subnormal, every NaN 0x7FFFFFFF.

    Raises:
        TypeError: not a float32 tensor.
    """
    bits = check_tensor("x", x, dtype=torch.float32, shape=("...",)).view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    exponent = magnitude >> 23
    # |x| as N + F/2^23, cut off below. Exponent 103 leaves nothing of 24 bits; 135 and above, where the
    # shift stops, are N >= 256 anyway: 0 or Inf.
    significand = ((magnitude & _FRACTION) | _MIN_NORMAL).to(torch.int64)
    fixed = (significand << (exponent - 103).clamp(0, 32)) >> 24
    # -(N + F) is -(N + 1) + (1 - F), where the unit takes the complement ~F for 1 - F unless F is 0.
    negated = ~fixed + ((fixed & _FRACTION) == 0)
    fixed = torch.where(bits < 0, negated, fixed)
    result = _interpolate("ex2", fixed & _FRACTION) + (((fixed >> 23) + 127) << 23)
    result = torch.where(result < _MIN_NORMAL, 0, result.clamp(max=_INF))
    return torch.where(magnitude > _INF, _NAN, result).to(torch.int32).view(torch.float32)


@uncompiled
def rcp(x: Tensor) -> Tensor:
    """rcp.approx.ftz.f32: 1/x, elementwise.

    Args:
        x: `[...]` float32, any shape and device; subnormals count as zeros of their sign.

    Returns:
        `[...]` float32, new: never subnormal, signed zeros and Infs, every NaN 0x7FFFFFFF.

    Raises:
        TypeError: not a float32 tensor.
    """
    bits = check_tensor("x", x, dtype=torch.float32, shape=("...",)).view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    exponent = magnitude >> 23
    # x = m * 2^(exponent - 127) with m in [1, 2); the rows give 1/m - 1/2 in units of 2^-24, 2^23 for m = 1.
    result = _interpolate("rcp", magnitude & _FRACTION) + ((253 - exponent) << 23)
    result = torch.where(result < _MIN_NORMAL, 0, result)
    result = torch.where(exponent == 0, _INF, result).to(torch.int32) | (bits ^ magnitude)
    return torch.where(magnitude > _INF, _NAN, result).view(torch.float32)


@uncompiled
def tanh(x: Tensor) -> Tensor:
    """tanh.approx.f32: tanh(x), elementwise; |x| below 2^-8 is itself, from 8 on it is 1.

    Args:
        x: `[...]` float32, any shape and device.

    Returns:
        `[...]` float32, new: subnormals are kept, every NaN is 0x7FFFFFFF.

    Raises:
        TypeError: not a float32 tensor.
    """
    bits = check_tensor("x", x, dtype=torch.float32, shape=("...",)).view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    exponent = (magnitude >> 23).to(torch.int64)
    binade = (exponent - TANH_FIRST).clamp(0, len(TANH_SEGMENTS) - 1)
    # Each binade has rows of 17 bits, the fraction's lowest being cut off.
    counts = torch.tensor(TANH_SEGMENTS, device=x.device)
    starts = counts.cumsum(0) - counts
    log2_counts = torch.tensor([count.bit_length() - 1 for count in TANH_SEGMENTS], device=x.device)
    fixed = (magnitude & _FRACTION).to(torch.int64) >> (6 - log2_counts[binade])
    c0, c1, c2 = torch.tensor(TANH_ROWS, device=x.device)[starts[binade] + (fixed >> 17)].unbind(-1)
    low = fixed & 0x1FFFF
    square = _squares(17).to(x.device)[low]
    result = (c0 << 17) + c1 * low + (c2 << 2) * square
    # In units of 2^-41, below 0.5 of half as much for each binade; cut off after 24 bits.
    power = -41 - (TANH_UNIT - exponent).clamp(0, TANH_UNIT - TANH_FIRST)
    unit = (power + 1023 << 52).view(torch.float64)
    wide = (result.to(torch.float64) * unit).view(torch.int64) & -(1 << 29)
    value = wide.view(torch.float64).to(torch.float32).view(torch.int32)
    value = torch.where(exponent < TANH_FIRST, magnitude, value)
    value = torch.where(exponent >= TANH_FIRST + len(TANH_SEGMENTS), 0x3F800000, value) | (bits ^ magnitude)
    return torch.where(magnitude > _INF, _NAN, value).view(torch.float32)


def _interpolate(unit: str, fraction: Tensor) -> Tensor:
    """int64 results of one unit's quadratic for 23-bit fractions."""
    c0, c1, c2, squares = constants(unit, fraction.device)
    low_bits = squares.numel().bit_length() - 1
    flat = fraction.reshape(-1).to(torch.int64)
    row, x = flat >> low_bits, flat & (squares.numel() - 1)
    # index_select takes a third of the time of indexing with a tensor.
    result = c0.index_select(0, row) + c1.index_select(0, row) * x
    result += c2.index_select(0, row) * squares.index_select(0, x)
    return (result >> 15).view(fraction.shape)


@lru_cache
def constants(unit: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A unit's C0 (scaled, with the bias), C1 and C2, int64 [rows], and all squares, int64 [2^low_bits]."""
    rows, bias = {"ex2": (_EX2_ROWS, _EX2_BIAS), "rcp": (_RCP_ROWS, _RCP_BIAS)}[unit]
    c0, c1, c2 = torch.tensor(rows, dtype=torch.int64, device=device).T.contiguous().unbind()
    return (c0 << 13) + bias, c1, c2, _squares(24 - len(rows).bit_length()).to(device)


def _squares(bits: int) -> Tensor:
    """The truncated squarer: x^2 of a 17-bit x, its partial products below column 19 left out, >> 19.

    A shorter x is aligned to the left. Two different bits i, j meet in column i + j + 1, a bit with
    itself in column 2i.
    """
    x = torch.arange(1 << bits, dtype=torch.int64, device="cpu") << (17 - bits)
    total = torch.zeros_like(x)
    for i in range(17):
        bit = (x >> i) & 1
        first = max(i + 1, 18 - i)  # the lowest j > i whose column i + j + 1 is kept
        total += bit * ((x >> first) << (first + i + 1))
        if 2 * i >= 19:
            total += bit << (2 * i)
    return total >> 19


# fmt: off
_EX2_BIAS = 6114
_EX2_ROWS = (
    (3, 22713, 494), (365386, 22960, 501), (734750, 23210, 506), (1108133, 23463, 511),
    (1485586, 23718, 518), (1867145, 23977, 521), (2252860, 24238, 527), (2642777, 24502, 532),
    (3036940, 24768, 541), (3435393, 25038, 546), (3838184, 25311, 551), (4245365, 25586, 559),
    (4656977, 25865, 564), (5073072, 26147, 568), (5493699, 26431, 577), (5918905, 26719, 583),
    (6348741, 27010, 589), (6783258, 27304, 596), (7222505, 27602, 600), (7666538, 27902, 609),
    (8115404, 28206, 615), (8569160, 28513, 622), (9027854, 28824, 627), (9491545, 29138, 633),
    (9960285, 29455, 641), (10434129, 29776, 647), (10913133, 30100, 655), (11397354, 30428, 661),
    (11886846, 30759, 670), (12381669, 31094, 677), (12881882, 31432, 686), (13387539, 31775, 691),
    (13898703, 32121, 699), (14415435, 32471, 705), (14937793, 32824, 715), (15465837, 33182, 721),
    (15999633, 33543, 730), (16539242, 33908, 739), (17084727, 34277, 748), (17636150, 34651, 753),
    (18193579, 35028, 763), (18757078, 35409, 773), (19326714, 35795, 779), (19902551, 36185, 787),
    (20484659, 36579, 796), (21073106, 36977, 806), (21667961, 37380, 813), (22269293, 37787, 822),
    (22877175, 38198, 833), (23491674, 38614, 842), (24112865, 39035, 849), (24740822, 39460, 858),
    (25375616, 39889, 870), (26017322, 40324, 877), (26666015, 40763, 887), (27321773, 41207, 896),
    (27984672, 41655, 909), (28654788, 42109, 917), (29332202, 42568, 925), (30016992, 43031, 938),
    (30709240, 43500, 946), (31409026, 43973, 959), (32116431, 44452, 969), (32831540, 44936, 980),
)

_RCP_BIAS = 2023
_RCP_ROWS = (
    (33554432, -65534, 1013), (33034210, -64522, 989), (32521990, -63533, 966), (32017589, -62567, 945),
    (31520830, -61622, 923), (31031544, -60699, 902), (30549560, -59797, 883), (30074714, -58914, 863),
    (29606852, -58051, 845), (29145822, -57207, 827), (28691473, -56381, 809), (28243659, -55572, 791),
    (27802245, -54781, 774), (27367092, -54007, 758), (26938067, -53249, 742), (26515042, -52507, 727),
    (26097893, -51780, 711), (25686498, -51068, 696), (25280738, -50371, 682), (24880498, -49688, 669),
    (24485667, -49019, 656), (24096137, -48363, 642), (23711799, -47721, 631), (23332554, -47091, 618),
    (22958297, -46473, 605), (22588934, -45868, 594), (22224366, -45274, 582), (21864502, -44692, 572),
    (21509254, -44121, 561), (21158529, -43560, 549), (20812245, -43011, 540), (20470315, -42471, 529),
    (20132661, -41942, 519), (19799201, -41423, 510), (19469856, -40913, 501), (19144555, -40412, 490),
    (18823219, -39921, 482), (18505780, -39439, 474), (18192164, -38965, 465), (17882305, -38500, 457),
    (17576133, -38043, 449), (17273585, -37594, 441), (16974597, -37153, 433), (16679106, -36720, 426),
    (16387050, -36294, 418), (16098371, -35876, 412), (15813010, -35464, 403), (15530910, -35060, 397),
    (15252017, -34663, 390), (14976273, -34272, 383), (14703628, -33888, 377), (14434032, -33511, 371),
    (14167429, -33140, 366), (13903772, -32774, 358), (13643012, -32415, 353), (13385102, -32062, 348),
    (13129997, -31714, 341), (12877650, -31373, 337), (12628014, -31036, 331), (12381048, -30705, 326),
    (12136711, -30379, 320), (11894960, -30059, 316), (11655753, -29743, 310), (11419049, -29432, 305),
    (11184812, -29127, 302), (10953004, -28826, 297), (10723584, -28529, 291), (10496516, -28237, 287),
    (10271767, -27950, 283), (10049298, -27667, 279), (9829078, -27388, 274), (9611071, -27114, 271),
    (9395243, -26843, 266), (9181563, -26577, 263), (8969998, -26314, 258), (8760518, -26056, 256),
    (8553093, -25801, 251), (8347690, -25550, 248), (8144282, -25302, 243), (7942838, -25058, 240),
    (7743332, -24818, 237), (7545736, -24581, 233), (7350021, -24348, 231), (7156161, -24117, 226),
    (6964129, -23890, 223), (6773901, -23667, 222), (6585451, -23446, 218), (6398754, -23228, 214),
    (6213786, -23014, 212), (6030523, -22802, 208), (5848939, -22593, 205), (5669016, -22388, 204),
    (5490727, -22184, 199), (5314052, -21984, 197), (5138969, -21787, 196), (4965456, -21592, 193),
    (4793492, -21399, 189), (4623057, -21209, 186), (4454131, -21022, 184), (4286691, -20837, 182),
    (4120722, -20655, 180), (3956201, -20475, 178), (3793111, -20297, 175), (3631434, -20122, 173),
    (3471150, -19949, 171), (3312241, -19778, 169), (3154692, -19609, 166), (2998483, -19443, 165),
    (2843598, -19278, 161), (2690020, -19116, 160), (2537732, -18956, 159), (2386719, -18797, 155),
    (2236964, -18641, 154), (2088452, -18487, 153), (1941167, -18334, 150), (1795096, -18184, 149),
    (1650220, -18035, 147), (1506527, -17888, 145), (1364004, -17743, 143), (1222632, -17600, 143),
    (1082403, -17458, 140), (943300, -17318, 138), (805309, -17180, 137), (668417, -17043, 135),
    (532612, -16908, 133), (397881, -16775, 132), (264209, -16643, 131), (131587, -16513, 130),
)

TANH_FIRST, TANH_UNIT = 119, 126  # exponent fields: of 2^-8, and of 0.5
TANH_SEGMENTS = (1, 1, 1, 2, 2, 4, 4, 4, 8, 16, 8)  # rows of each binade from 2^-8 on
TANH_ROWS = (
    (8388608, 8388608, -256), (8388480, 8388096, -768), (8387968, 8387072, -3328),
    (8385888, 4190464, -2624), (12573728, 4185216, -3520), (8377696, 4178688, -10176),
    (12546144, 4158464, -14208), (8345192, 2065024, -8944), (10401240, 2047104, -10816),
    (12437488, 2025472, -12640), (14450304, 2000192, -14256), (8218080, 1972352, -33104),
    (10157208, 1905920, -38592), (12024448, 1828576, -42976), (13809984, 1742432, -46304),
    (7753000, 1650272, -98592), (9304656, 1451968, -100608), (10656104, 1250016, -96608),
    (11809672, 1056352, -88688), (12777544, 878752, -78584), (13577912, 721632, -67824),
    (14231944, 586144, -57152), (14761140, 472016, -47384), (15185952, 377440, -38736),
    (15524804, 300160, -31376), (15793720, 237600, -25152), (16006268, 187456, -20072),
    (16173728, 147496, -15946), (16305345, 115768, -12590), (16408581, 90696, -9898),
    (16489421, 70984, -7784), (16552657, 55480, -6094), (16602069, 43340, -4776),
    (16640655, 33828, -3734), (16670765, 26396, -2920), (16694254, 20584, -2278),
    (16712570, 16048, -1778), (16726848, 12508, -1386), (16737977, 9748, -1082),
    (16746648, 7596, -842), (16753405, 5916, -654), (16758669, 4608, -508),
    (16762770, 3588, -394), (16766000, 10544, -3504), (16773088, 3888, -1296),
    (16775696, 1424, -464), (16776656, 528, -176), (16777012, 192, -64),
    (16777140, 80, -32), (16777188, 32, -16), (16777204, 16, -8),
)
# fmt: on
