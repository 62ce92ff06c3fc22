#define ISA amx
#include "cpu/linear_tiles.h"
#include "cpu/probe.h"

namespace llava_fast {

// Two tiles against two, as the products of linear_tiles.h go, and loaded as they are: from L1, where they stay.
void tile_rounds_amx(int64_t rounds) {
    const amx::TileShapes shapes;
    alignas(64) char tiles[4][1024] = {};
    asm volatile("" : : "r"(tiles) : "memory");
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t r = 0; r < rounds; ++r) {
        _tile_loadd(4, tiles[0], 64);
        _tile_loadd(5, tiles[1], 64);
        _tile_loadd(6, tiles[2], 64);
        _tile_loadd(7, tiles[3], 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

}  // namespace llava_fast
