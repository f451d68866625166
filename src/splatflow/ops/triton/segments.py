"""Kernels of the sparse scan: running sums of events within their rows, and what is found where events read.

Events that write are in the order of (row, time). Those of one row are cut into *segments* of a fixed number of events,
counted from the first of the row, and a program walks the tiles of one segment. So what a sum is made of depends on the
events before it at its own row and on nothing else, however many later ones are sorted in between: the future moves no
bit. Nothing is copied in that order; rows of numbers are gathered where they lie.

`times` are logarithms of what is left, in fp64, which fall in the order of events; after a while exp(then - before) is
left, of differences of fp64. None: nothing fades. Numbers that a product with 0 would carry into the past are selected.
"""

# N sequence and head, M row of the table, E event, Q segment, C event of a tile, X row width, XB columns of a program

import triton
import triton.language as tl


@triton.jit
def left(then, before):
    """What is left after a while, in fp32: the difference is one of fp64."""
    return tl.exp((then - before).to(tl.float32))


@triton.jit
def within(rows, times, C: tl.constexpr, FADES: tl.constexpr):
    """The sums of rows [C, XB] up to each event of a tile, faded to its time [C]."""
    if FADES:
        i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
        kept = left(times[:, None], times[None, :])[:, :, None]  # [i, j, 1]
        return tl.sum(tl.where((j <= i)[:, :, None], kept * rows[None, :, :], 0.0), 1)
    else:
        return tl.cumsum(rows, 0)


@triton.jit
def segment_sums_kernel(
    rows, by, rank, starts, times, segment_sums, num_events, num_segments, width,
    C: tl.constexpr, LENGTH: tl.constexpr, XB: tl.constexpr, FADES: tl.constexpr,
):  # fmt: skip
    """What each segment that is not the last of its row adds to it, at the time of its last event.

    Reads X numbers of each event of these segments, and where it stands, and writes X a segment: of a row with at most
    `LENGTH` events nothing.
    """
    number, x = tl.program_id(0).to(tl.int64), tl.program_id(1) * XB + tl.arange(0, XB)
    sequence = number // num_segments
    first_event = sequence * num_events
    start, end = tl.load(starts + number + sequence), tl.load(starts + number + sequence + 1)
    if tl.load(rank + first_event + end, mask=end < num_events, other=0) > 0:  # the next segment is of the same row
        total = tl.zeros([XB], tl.float32)
        for tile in range(LENGTH // C):  # such a segment is whole
            event = first_event + tl.load(by + first_event + start + tile * C + tl.arange(0, C))
            sent = tl.load(rows + event[:, None] * width + x[None, :], mask=(x < width)[None, :], other=0.0)
            if FADES:
                until = tl.load(times + first_event + tl.load(by + first_event + end - 1))
                sent *= left(until, tl.load(times + event))[:, None]
            total += tl.sum(sent, 0)
        tl.store(segment_sums + number * width + x, total, mask=x < width)


@triton.jit
def running_sums_kernel(
    rows, by, rank, starts, times, segment_sums, sums, num_events, num_segments, width,
    C: tl.constexpr, LENGTH: tl.constexpr, XB: tl.constexpr, FADES: tl.constexpr,
):  # fmt: skip
    """At each event, in order, the sum of what was written to its row so far, faded to the time of the event.

    Reads X numbers of fp32 an event and where it stands (8 bytes a slice of columns), with a clock also its time, and
    writes X: 544 bytes for X = 65 in three slices, where 520 are the least. Operations: X sums an event, with a clock
    2 C X and C exponentials a slice. A segment also reads X numbers for each one before it of the same row.
    """
    number, x = tl.program_id(0).to(tl.int64), tl.program_id(1) * XB + tl.arange(0, XB)
    sequence = number // num_segments
    first_event = sequence * num_events
    at = starts + number + sequence
    start, end = tl.load(at), tl.load(at + 1)
    if start < end:
        before = tl.load(rank + first_event + start) // LENGTH  # segments of the same row
        carried, since = tl.zeros([XB], tl.float32), tl.zeros([1], tl.float64)
        if FADES:
            since += tl.load(times + first_event + tl.load(by + first_event + start))
        done = before * 0
        while done < before:
            earlier = done + tl.arange(0, C)  # from the first of the row
            there = earlier < before
            inside = there[:, None] & (x < width)[None, :]
            place = number - before + earlier
            added = tl.load(segment_sums + place[:, None] * width + x[None, :], mask=inside, other=0.0)
            if FADES:
                last = tl.load(at - before + earlier + 1, mask=there, other=1) - 1
                ended = tl.load(times + first_event + tl.load(by + first_event + last, mask=there, other=0))
                added = tl.where(inside, added * left(since, ended)[:, None], 0.0)
            carried += tl.sum(added, 0)
            done += C
        while start < end:
            place = start + tl.arange(0, C)
            inside = (place < end)[:, None] & (x < width)[None, :]
            # beyond the end there is the last event again, so that time stands still
            event = first_event + tl.load(by + first_event + tl.minimum(place, end - 1))
            sent = tl.load(rows + event[:, None] * width + x[None, :], mask=inside, other=0.0)
            if FADES:
                now = tl.load(times + event)
                here = within(sent, now, C, FADES) + carried[None, :] * left(now, since)[:, None]
                since = tl.min(now, 0, keep_dims=True)
            else:
                here = within(sent, None, C, FADES) + carried[None, :]
            tl.store(sums + (first_event + place)[:, None] * width + x[None, :], here, mask=inside)
            carried = tl.sum(tl.where((tl.arange(0, C) == C - 1)[:, None], here, 0.0), 0)
            start += C


@triton.jit
def look_up_kernel(
    table, sums, by, times, begin, read_at, last, found, num_events, num_rows, width,
    C: tl.constexpr, XB: tl.constexpr, FADES: tl.constexpr,
):  # fmt: skip
    """What each reading event finds: the sum at the last event before it, and the row of the table, faded both.

    Reads 2 X numbers of fp32 an event and two places (16 bytes a slice of columns), with a clock a place and two times
    more, and writes X: 828 bytes for X = 65 in three slices, where 780 are the least. With `running_sums_kernel` 1,372;
    if no sum had to be written and read again it were 780.
    """
    program, x = tl.program_id(0), tl.program_id(1) * XB + tl.arange(0, XB)
    tiles = tl.cdiv(num_events, C)
    sequence = (program // tiles).to(tl.int64)
    first_event = sequence * num_events
    event = program % tiles * C + tl.arange(0, C)
    real, inside = event < num_events, (x < width)[None, :]
    row = sequence * num_rows + tl.load(read_at + first_event + event, mask=real, other=0)
    writer = tl.load(last + first_event + event, mask=real, other=-1)
    wrote = writer >= 0
    heard = tl.load(
        sums + (first_event + writer)[:, None] * width + x[None, :], mask=wrote[:, None] & inside, other=0.0
    )
    stood = tl.load(table + row[:, None] * width + x[None, :], mask=real[:, None] & inside, other=0.0)
    if FADES:
        now = tl.load(times + first_event + event, mask=real, other=0.0)
        written = tl.load(by + first_event + writer, mask=wrote, other=0)
        then = tl.load(times + first_event + written, mask=wrote, other=0.0)
        heard *= tl.where(wrote, left(now, then), 0.0)[:, None]
        stood *= left(now, tl.load(begin + sequence))[:, None]
    at = found + (first_event + event)[:, None] * width + x[None, :]
    tl.store(at, heard + stood, mask=real[:, None] & inside)


@triton.jit
def add_last_kernel(
    table, sums, sorted_at, by, times, end, num_events, num_rows, width,
    C: tl.constexpr, XB: tl.constexpr, FADES: tl.constexpr,
):  # fmt: skip
    """To each row of the table, in place, the sum at its last event, faded to the end. No two programs have one row.

    Reads 2 X numbers of fp32 and writes X for each row that was written to, which is the least, and 16 bytes an event.
    """
    program, x = tl.program_id(0), tl.program_id(1) * XB + tl.arange(0, XB)
    tiles = tl.cdiv(num_events, C)
    sequence = (program // tiles).to(tl.int64)
    first_event = sequence * num_events
    place = program % tiles * C + tl.arange(0, C)
    row = tl.load(sorted_at + first_event + place, mask=place < num_events, other=-1)
    next_row = tl.load(sorted_at + first_event + place + 1, mask=place + 1 < num_events, other=-1)
    ends = row != next_row
    inside = ends[:, None] & (x < width)[None, :]
    added = tl.load(sums + (first_event + place)[:, None] * width + x[None, :], mask=inside, other=0.0)
    if FADES:
        event = tl.load(by + first_event + place, mask=ends, other=0)
        then = tl.load(times + first_event + event, mask=ends, other=0.0)
        added *= left(tl.load(end + sequence), then)[:, None]
    at = table + (sequence * num_rows + row)[:, None] * width + x[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0) + added, mask=inside)
