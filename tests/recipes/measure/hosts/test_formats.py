"""The table of formats: over all workers and seeds, and merges that cost what came in vain, too."""

from recipes.measure.hosts.formats import show_formats


def result(rank, seed, loss, merges, received, resent):
    return {
        "rate": "1mbit", "wire_dtype": "int4", "hosts": 2, "parameter_bytes": 4_000_000, "steps_in_all": 10,
        "rank": rank, "seed": seed, "loss": loss, "merges": merges, "received": received, "resent": resent,
        "consensus_distance": 0.25, "mass": 2.0,
    }  # fmt: skip


def test_each_format_has_a_row(capsys):
    runs = [result(0, 1, 4.0, 4.0, 9e3, 1.0), result(1, 1, 4.0, 2.0, 3e3, 0.0)]
    runs += [result(0, 2, 5.0, 0.0, 1e3, 0.0), result(1, 2, 5.0, 2.0, 3e3, 1.0)]
    show_formats(runs)
    row = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].strip("|").split("|")]
    assert row == ["1mbit", "int4", "4.500 (4.000, 5.000)", "0.200", "2 kB", "0.5", "0.2500", "2"]


def test_a_format_that_merged_nothing_is_shown(capsys):
    show_formats([result(0, 1, 4.0, 0.0, 5e3, 0.0)])
    assert "| 0.000 | none |" in capsys.readouterr().out
