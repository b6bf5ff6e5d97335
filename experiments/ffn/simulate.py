"""Runs the kernel's barriers (stages, board, turns) as coroutines in random order: a deadlock or a wrong stage fails."""
import random, sys

class Bar:
    def __init__(s, count): s.count, s.pending, s.phase, s.tx = count, count, 0, 0
    def _check(s):
        if s.pending == 0 and s.tx == 0: s.phase ^= 1; s.pending = s.count
    def arrive(s): assert s.pending > 0, "overrun"; s.pending -= 1; s._check()
    def expect(s, n): s.tx += n; s.arrive()
    def complete(s, n): s.tx -= n; s._check()
    def passed(s, parity): return s.phase != parity  # mbarrier.test_wait.parity

def run(seed):
    r = random.Random(seed)
    cluster = r.choice([1, 2]); groups = r.choice([2, 3]); stages = r.choice([3, 4])
    along_n = cluster == 2 and groups == 2 and r.random() < .5
    lead = r.choice([0, 1, 2, min(4, stages)]) if groups == 2 else 0
    contracts = r.random() < .5
    fixed = r.randint(1, 9)
    extra = 0 if contracts else r.choice([0, 4])  # blocks for the epilogue
    tiles = []  # (k_blocks, rows of each rank)
    for _ in range(r.randint(0, 25)):
        k = r.choice([1, 1, 2, 3, 4, 7]) if contracts else fixed
        rows = r.randint(1, 64 * groups * cluster)
        per = [groups * 64 if contracts else max(0, min(rows - c * 64 * groups, 64 * groups)) for c in range(cluster)]
        if along_n: per = [per[0]] * 2 if contracts else [min(rows, 128)] * 2
        if contracts and r.random() < .3: per = [r.choice([64, groups * 64]) for _ in per]
        tiles.append((k, per))
    class Cta: pass
    ctas = []
    for c in range(cluster):
        x = Cta(); ctas.append(x)
        x.full = [Bar(1) for _ in range(stages)]; x.empty = [Bar(groups * cluster) for _ in range(stages)]
        x.posted = [Bar(1) for _ in range(4)]; x.taken = [Bar(groups) for _ in range(4)]
        x.turns = [Bar(1), Bar(1)]; x.tiles = [None] * 4
        x.a = [[None] * groups for _ in range(stages)]; x.b = [[None] * 4 for _ in range(stages)]
    flying = []  # loads on their way
    def producer(c):
        x = ctas[c]; stage = phase = 0
        for i, (k_blocks, per) in enumerate(tiles + [(None, None)]):
            place = i % 4
            while not x.taken[place].passed((i // 4 & 1) ^ 1): yield
            x.tiles[place] = i; x.posted[place].arrive()
            if k_blocks is None: return
            boxes = groups if contracts else -(-per[c] // 64)
            for k in range(k_blocks):
                while not x.empty[stage].passed(phase ^ 1): yield
                x.full[stage].expect(boxes + 4)
                shared_a, shared_b = cluster > 1 and along_n, cluster > 1 and not along_n
                loads = groups // 2 if shared_a else groups
                for j in range(loads):
                    box = c * loads + j if shared_a else j
                    if box < boxes: flying.append((ctas if shared_a else [x], 'a', stage, box, (i, k)))
                for j in range(2 if shared_b else 4):
                    box = c * 2 + j if shared_b else j
                    flying.append((ctas if shared_b else [x], 'b', stage, box, (i, k)))
                yield
                stage += 1
                if stage == stages: stage, phase = 0, phase ^ 1
            for e in range(extra):
                while not x.empty[stage].passed(phase ^ 1): yield
                x.full[stage].expect(boxes * 2)
                for box in range(boxes):
                    for what in 'ab': flying.append(([x], what, stage, box, (i, 'e', e)))
                yield
                stage += 1
                if stage == stages: stage, phase = 0, phase ^ 1
    done = []
    def consumer(c, g):
        x = ctas[c]; stage = phase = 0; turn_phase = int(g == 0)
        def release(s):
            for other in ctas: other.empty[s].arrive()
        i = 0
        while True:
            place = i % 4
            while not x.posted[place].passed(i // 4 & 1): yield
            t = x.tiles[place]; x.taken[place].arrive(); assert t == i
            if t == len(tiles): return
            k_blocks, per = tiles[t]
            active = per[c] > 64 * g
            if lead:
                while not x.turns[g].passed(turn_phase): yield
                turn_phase ^= 1
                after = (min(lead, k_blocks) if g == 0 else k_blocks) if active else 0
                if after == 0: x.turns[1 - g].arrive()
            last = None
            for k in range(k_blocks):
                while not x.full[stage].passed(phase): yield
                if not active:
                    release(stage)
                else:
                    assert x.a[stage][g] == (i, k) and x.b[stage] == [(i, k)] * 4, "wrong stage"
                    if lead and k + 1 == after: x.turns[1 - g].arrive()
                    yield
                    if last is not None: release(last)
                    last = stage
                stage += 1
                if stage == stages: stage, phase = 0, phase ^ 1
                yield
            if last is not None:
                assert x.b[last] == [(i, k_blocks - 1)] * 4
                release(last)
            last = None
            for e in range(extra):
                while not x.full[stage].passed(phase): yield
                if not active:
                    release(stage)
                else:
                    for _ in range(r.randint(0, 4)): yield
                    assert x.a[stage][g] == x.b[stage][g] == (i, 'e', e)
                    if last is not None: assert x.a[last][g] == (i, 'e', e - 1); release(last)
                    last = stage
                stage += 1
                if stage == stages: stage, phase = 0, phase ^ 1
            if last is not None: yield; release(last)
            for _ in range(r.randint(0, 6)): yield  # epilogue
            done.append((c, g, i)); i += 1
    jobs = [producer(c) for c in range(cluster)] + [consumer(c, g) for c in range(cluster) for g in range(groups)]
    idle = 0
    while jobs:
        if flying and r.random() < .4:
            to, what, stage, box, tag = flying.pop(r.randrange(len(flying)))
            for x in to: getattr(x, what)[stage][box] = tag; x.full[stage].complete(1)
            idle = 0
        j = r.choice(jobs)
        try: next(j)
        except StopIteration: jobs.remove(j); idle = 0
        idle += 1
        if idle > 20000 and not flying: raise SystemExit(f"DEADLOCK seed {seed} cluster {cluster} groups {groups} stages {stages} lead {lead} along_n {along_n} contracts {contracts} tiles {tiles}")
    assert len(done) == len(tiles) * cluster * groups

for seed in range(int(sys.argv[1])): run(seed)
print("ok")
