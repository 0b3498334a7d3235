"""A clock for the tests of what is made of its times."""


class Scripted:
    """A clock that says the next of a variant's times, in milliseconds, and notes what it was asked for."""

    device = "cpu"

    def __init__(self, times=(), bandwidths=(1e9,)):
        self.times, self.bandwidths = dict(times), list(bandwidths)
        self.calls, self.prepared, self.counted, self.copies = [], [], [], 0

    def input_sets(self, case_bytes):
        self.case_bytes = case_bytes
        return 3

    def prepare(self, launch, case_bytes):
        self.prepared.append((launch, case_bytes))
        return "scripted"

    def time(self, launch, turn):
        self.calls.append((launch, turn))
        return self.times[launch.name].pop(0) if self.times else 1.0

    def bandwidth(self):
        self.copies += 1
        return self.bandwidths.pop(0) if len(self.bandwidths) > 1 else self.bandwidths[0]

    def host_microseconds(self, launch):
        return None

    def extra_memory(self, call):
        self.counted.append(call())
        return 123
