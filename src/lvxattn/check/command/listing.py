"""The cases, as a table."""

from lvxattn.check.cases import Case, suite_of


def list_cases() -> int:
    """Print the cases of both suites: name, group, shapes, reason."""
    quick = suite_of("quick")
    more = [case for case in suite_of("full") if case not in quick]
    for title, cases in (
        ("quick suite, and full", quick),
        ("full suite only; NAME.large is that case with more queries and keys", more),
    ):
        print(f"{title}: {len(cases)} cases")
        rows = [(case.name, case.group, shapes_of(case), case.reason) for case in cases]
        widths = [max(len(row[n]) for row in rows) for n in range(3)]
        for *columns, reason in rows:
            cells = (cell.ljust(width) for cell, width in zip(columns, widths, strict=True))
            print("  " + "  ".join(cells) + f"  {reason}")
    return 0


def shapes_of(case: Case) -> str:
    """Return the shapes of q and k, and of v if its width is another."""
    shapes = {
        "q": (case.B, case.H, case.S_Q, case.D),
        "k": (case.B, case.H_KV, case.S_KV, case.D),
        "v": (case.B, case.H_KV, case.S_KV, case.D_V),
    }
    if case.D_V == case.D:
        del shapes["v"]
    return " ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
