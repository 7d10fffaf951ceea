"""What a row costs: the price of a machine's hour times the time that a call takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class PriceError(ValueError):
    """A price that cannot be read; the message says what was wanted."""


def parse(words: Sequence[str]) -> dict[str, float]:
    """`["h100=2.99", "cpu=0.4"]` as device -> US dollars an hour.

    Raises:
        PriceError: a word of another form, or a price that is not a positive number.
    """
    prices = {}
    for word in words:
        device, sign, text = word.rpartition("=")
        try:
            price = float(text)
        except ValueError:
            price = -1.0
        if not sign or not device or not price > 0:
            raise PriceError(f"wanted DEVICE=USD_PER_HOUR with a price above 0, got {word!r}")
        prices[device.lower()] = price
    return prices


def price_of(prices: Mapping[str, float], about: Mapping[str, Any], row: Mapping[str, Any]) -> float | None:
    """The price of a row's machine: by its device's type (`cpu`), or a part of its device's or processor's name."""
    kind = str(row.get("device") or "cpu").lower()
    names = [str(about.get(n) or "").lower() for n in ("device_name", "processor")]
    for device, price in prices.items():
        if device == kind or any(device in name for name in names):
            return price
    return None


def costs(price: float, row: Mapping[str, Any]) -> dict[str, float | None]:
    """US dollars for a million calls, and for a billion tokens where the row says how many tokens a call has."""
    a_call = row["median_s"] * price / 3600
    tokens = row.get("tokens")
    return {"usd_per_million_calls": a_call * 1e6, "usd_per_billion_tokens": a_call / tokens * 1e9 if tokens else None}


def add(prices: Mapping[str, float], about: Mapping[str, Any], row: dict[str, Any]) -> None:
    """Puts a row's costs into it, where it has a time and its machine a price."""
    price = price_of(prices, about, row)
    if price is not None and row.get("status") == "ok":
        row |= costs(price, row)
