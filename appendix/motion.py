"""How the things in the frames of a toy video move: straight on, and back from the walls."""

def next_frame(rng, scene, steps):
    """The scene one step later. steps: {name: [dx, dy]} in pixels, filled and changed here."""
    side = scene["side"]
    moved = []
    for o in scene["objects"]:
        # Drawn for every frame, but used for the first step only. To draw less often would change
        # the scenes of every seed.
        first_step = [random_step(rng, side), random_step(rng, side)]
        step = steps.setdefault(o["name"], first_step)
        center = list(o["center"])
        for axis in (0, 1):
            wall = o["radius"] + 4
            if not wall <= center[axis] + step[axis] <= side - wall:
                step[axis] = -step[axis]
            center[axis] += step[axis]
        moved.append({**o, "center": center})
    return {"side": side, "objects": moved}


def random_step(rng, side):
    return rng.choice((-1, 1)) * rng.randint(side // 14, side // 6)
