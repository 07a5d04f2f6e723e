"""What a machine's figures were measured with."""

from dataclasses import dataclass

from lvxattn.common.validation import FLOATING


@dataclass(frozen=True)
class Measured:
    """What a machine's figures were measured with: other problems may reach others.

    Attributes
    ----------
    by : str
        The implementation, as ``"mpi_impl"``.
    device : str
        Where ranks compute.
    H, H_KV, D : int
        Heads of queries and of keys, and their width.
    dtype : str
    """

    by: str
    device: str
    H: int
    H_KV: int
    D: int
    dtype: str

    def __str__(self) -> str:
        """Say it in a line."""
        return (
            f"{self.H}/{self.H_KV} heads of {self.D} in {self.dtype}, by {self.by} on {self.device}"
        )

    def beside(self, whose: str, heads: tuple[int, int, int], dtype: str) -> str:
        """Say it in a line, and what is different elsewhere.

        Parameters
        ----------
        whose : str
            As ``"the plan"``.
        heads : (H, H_KV, D)
        dtype : str
        """
        others = []
        if heads != (self.H, self.H_KV, self.D):
            others += ["other heads"]
        if dtype != self.dtype:
            others += ["another dtype"]
        return f"{self}; {whose} has {' and '.join(others)}" if others else str(self)

    def check(self, where: str) -> None:
        """Refuse what no probe can have said.

        Parameters
        ----------
        where : str
            What the error is to name.

        Raises
        ------
        ValueError
        """
        for name, x in (("by", self.by), ("device", self.device)):
            if not isinstance(x, str):
                raise ValueError(
                    f"machine: expected a text for measured.{name} in {where}, got {x!r}"
                )
        for name, n in (("H", self.H), ("H_KV", self.H_KV), ("D", self.D)):
            if not isinstance(n, int) or n < 1 or isinstance(n, bool):
                raise ValueError(
                    f"machine: expected an int above 0 for measured.{name} in {where}, got {n!r}"
                )
        if self.dtype not in FLOATING:
            raise ValueError(
                f"machine: expected one of {FLOATING} for measured.dtype in {where}, "
                f"got {self.dtype!r}"
            )
