"""Pictures of the studio against plain rendering of everything: byte for byte the same."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
from vlactl_libero.init_states import read_state
from vlactl_libero.tasks import suite_tasks

pytestmark = [pytest.mark.sim, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

SIZE = 64
CAMERAS = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}
NOTHING = (np.zeros(0, np.int64), np.zeros(0, np.float32))
# A stove, which is a mirror and glows when it is on; no mirror; a kitchen of large meshes.
TASKS = [("libero_goal", 7, 256), ("libero_object", 0, SIZE), ("libero_90", 10, SIZE)]

ROOM = """
<mujoco>
  <asset>
    <material name="steel" reflectance="{steel}" rgba=".4 .4 .5 1"/>
    <material name="floor" reflectance="{floor}" rgba=".3 .5 .4 1"/>
    <texture type="skybox" builtin="gradient" rgb1=".3 .5 .7" rgb2="0 0 0" width="64" height="64"/>
    <mesh name="ball" builtin="sphere" params="4" scale=".3 .1 .2"/>
  </asset>
  <worldbody>
    <light pos="0 1 3" dir="0 -.3 -1" castshadow="{shadow}"/>
    <geom type="plane" size="4 4 .1" material="floor" group="1"/>
    <body name="mirror" mocap="true">
      <geom type="box" size=".4 .3 .1" material="steel" group="1"/>
      <geom type="box" size=".3 .2 .3" pos="0 0 .2" group="0"/>
      <site name="glow" type="cylinder" size=".2 .2" pos="0 0 .1" rgba="1 0 0 1"/>
    </body>
    <body name="agentview" mocap="true"><camera name="agentview"/></body>
    <body name="wrist" mocap="true"><camera name="robot0_eye_in_hand" fovy="75"/></body>
    {things}
  </worldbody>
</mujoco>
"""
THING = """<body mocap="true"><geom type="{}" {} rgba="{} .4 .8 {}" group="1"/></body>"""
SHAPES = {
    "box": 'size=".1 .2 .05"',
    "sphere": 'size=".15"',
    "capsule": 'size=".05 .2"',
    "ellipsoid": 'size=".05 .1 .2"',
    "cylinder": 'size=".1 .2"',
    "mesh": 'mesh="ball"',
}


@pytest.fixture(scope="module")
def studio():
    from vlactl_libero.pictures import Studio

    studio = Studio()
    yield studio
    studio.close()


@pytest.fixture(scope="module")
def plain():
    """Makes renderers of everything in a context of this thread."""
    import mujoco

    window = mujoco.GLContext(SIZE, SIZE)
    window.make_current()
    option = mujoco.MjvOption()
    option.geomgroup[0] = 0
    camera = mujoco.MjvCamera()
    camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
    rectangle = mujoco.MjrRect(0, 0, SIZE, SIZE)

    def renderer(model):
        context, scene = mujoco.MjrContext(model, 150), mujoco.MjvScene(model, 1000)

        def render(data, name):
            camera.fixedcamid = model.camera(CAMERAS[name]).id
            mujoco.mjv_updateScene(model, data, option, None, camera, 7, scene)
            mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, context)
            mujoco.mjr_render(rectangle, scene, context)
            pixels = np.empty((SIZE, SIZE, 3), np.uint8)
            mujoco.mjr_readPixels(pixels, None, rectangle, context)
            return pixels[::-1, ::-1]

        return lambda data: {name: render(data, name) for name in CAMERAS}

    yield renderer
    window.free()


def make_room(steel=0.5, floor=0.0, shadow="false", num_things=18):
    """A model with a mirror among things of all shapes, some of them transparent."""
    import mujoco

    shapes = list(SHAPES)
    things = [
        THING.format(
            shapes[i % len(shapes)], SHAPES[shapes[i % len(shapes)]], i / num_things, 1 - i % 2 / 2
        )
        for i in range(num_things)
    ]
    xml = ROOM.format(steel=steel, floor=floor, shadow=shadow, things="".join(things))
    model = mujoco.MjModel.from_xml_string(xml)
    model.vis.global_.offwidth = model.vis.global_.offheight = SIZE
    return model


def stir(model, data, rng):
    """Move the mirror, the cameras and all things anywhere, cameras looking anywhere."""
    import mujoco

    data.mocap_pos[:] = rng.uniform([-1.5, -1.5, 0], [1.5, 1.5, 1.5], data.mocap_pos.shape)
    data.mocap_quat[:] = rng.normal(size=data.mocap_quat.shape)
    data.mocap_quat[0] = [1, *rng.normal(scale=0.1, size=3)]  # the mirror's
    mujoco.mj_forward(model, data)


@pytest.mark.parametrize("price", [-(10**9), 10**9])
def test_nothing_that_is_left_out_would_be_seen(studio, plain, monkeypatch, price):
    from vlactl_libero import culling

    # A second pass for the mirror always or never.
    monkeypatch.setattr(culling, "_PASS_TRIANGLES", price)
    assert_all_is_seen(studio, plain, make_room(), num_pictures=120)


@pytest.mark.parametrize("kind", [{"steel": 0}, {"floor": 0.2}, {"shadow": "true"}], ids=str)
def test_rooms_without_a_mirror_or_with_more_than_that(studio, plain, kind):
    assert_all_is_seen(studio, plain, make_room(**kind), num_pictures=5)


def test_most_is_left_out_and_mirrors_are_drawn_in_all_ways():
    import mujoco
    from vlactl_libero.culling import Culling, Eye

    model, rng = make_room(num_things=120), np.random.default_rng(0)
    data, scene = mujoco.MjData(model), mujoco.MjvScene(model, 0)
    camera = mujoco.MjvCamera()
    camera.type, camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, 0
    culling, ways, hidden = Culling(model, mujoco.MjvOption()), set(), []
    for _ in range(100):
        stir(model, data, rng)
        mujoco.mjv_updateCamera(model, data, camera, scene)
        parts = culling.parts(data, Eye.of(scene, SIZE), culling.boxes(data))
        ways.add(tuple(part.reflects for part in parts))
        hidden += [len(part.hidden) for part in parts]
    assert ways == {(False,), (True,), (False, True)}
    assert np.mean(hidden) > 60


def test_simulators_in_threads_share_a_model_but_not_what_glows(studio):
    import mujoco
    from vlactl_libero.pictures import Drawable, View

    model = make_room()
    drawable = Drawable(studio, model, SIZE)
    sites = np.array([model.site("glow").id])

    def play(index, pictures):
        rng, data, view = np.random.default_rng(index // 2), mujoco.MjData(model), View(drawable)
        for _ in range(10):
            stir(model, data, rng)
            view.capture(data, list(CAMERAS), sites, np.array([index % 2], np.float32))
            pictures.append(list(view.draw().values()))

    alone, together = [[] for _ in range(4)], [[] for _ in range(4)]
    for index in range(4):
        play(index, alone[index])
    threads = [threading.Thread(target=play, args=(i, together[i])) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(together, alone)
    assert (np.array(alone[0]) != alone[1]).any()  # dark and lit
    drawable.free()


@pytest.fixture(params=TASKS, ids=lambda param: f"{param[0]}-{param[1]}")
def stock(request):
    """Stock LIBERO with its own renderer, and the size of pictures."""
    from libero.libero.envs import OffScreenRenderEnv

    suite, index, size = request.param
    task = suite_tasks(suite)[index]
    env = OffScreenRenderEnv(
        bddl_file_name=str(task.bddl_file), camera_heights=SIZE, camera_widths=SIZE
    )
    env.seed(0)
    env.reset()
    env.set_init_state(read_state(task.init_file, 0))
    yield env, size
    env.close()
    gc.collect()


def test_pictures_of_libero_equal_those_of_stock(studio, stock):
    from vlactl_libero.pictures import Drawable, View

    env, size = stock
    drawables = {pixels: Drawable(studio, env.sim.model._model, pixels) for pixels in {SIZE, size}}
    rng = np.random.default_rng(0)
    glows = set()
    for pixels in (SIZE, SIZE, SIZE, size, SIZE):
        glows.add(assert_looks_like_stock(View(drawables[pixels]), env.sim, pixels))
        turn_stove(env.env)
        action = np.append(rng.uniform(-1, 1, 6), 1.0)
        for _ in range(4):
            env.step(action)
    assert len(glows) == (2 if "flat_stove_1" in env.env.object_states_dict else 1)
    for drawable in drawables.values():
        drawable.free()


def assert_all_is_seen(studio, plain, model, num_pictures):
    import mujoco
    from vlactl_libero.pictures import Drawable, View

    rng, data, render = np.random.default_rng(0), mujoco.MjData(model), plain(model)
    drawable = Drawable(studio, model, SIZE)
    view = View(drawable)
    for _ in range(num_pictures):
        stir(model, data, rng)
        view.capture(data, list(CAMERAS), *NOTHING)
        assert_same(view.draw(), render(data))
    drawable.free()


def assert_looks_like_stock(view, sim, size):
    expected = {
        name: sim.render(size, size, camera_name=theirs)[::-1, ::-1]
        for name, theirs in CAMERAS.items()
    }
    model = sim.model._model
    sites = np.flatnonzero(model.site_group < 3)
    alphas = model.site_rgba[sites, 3].copy()
    model.site_rgba[sites, 3] = 0.5  # another simulator's, say
    view.capture(sim.data._data, list(CAMERAS), sites, alphas)
    assert_same(view.draw(), expected)
    return tuple(alphas)


def turn_stove(domain):
    """On if it is off, or off; the next control step makes it glow."""
    stove = domain.object_states_dict.get("flat_stove_1")
    if stove is not None:
        stove.set_joint(0.0 if stove.turn_on() else 1.0)


def assert_same(pictures, expected):
    assert pictures.keys() == expected.keys()
    for name, picture in pictures.items():
        assert picture.flags.c_contiguous
        np.testing.assert_array_equal(picture, expected[name])
