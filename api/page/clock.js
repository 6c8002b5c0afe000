// The server's clock, as far as its answers tell: countdowns must end when the server says, not when this device does.
//
// Each answer says that the server's clock stood at some instant while we waited for it, and so bounds the difference
// of the two clocks from below and from above. What is known is where all those bounds overlap; when they do not, a
// clock has jumped, and we begin again with what we heard last. Ours jumps too: many devices stop it while they sleep.

export class ServerClock {
  #least = -Infinity; // of (server's clock - ours), ms
  #most = Infinity;
  #hasJumped = false; // since an answer bounded it from above

  // Ours: it does not jump when somebody sets the device's clock.
  local() {
    return performance.now();
  }

  // The server's clock, in ms since 1970.
  now() {
    return this.local() + this.#offset();
  }

  // The server's clock was within `resolution` ms after `instant`, at some moment from `from` to `until` (ours).
  saw(instant, resolution, from, until) {
    if (!Number.isFinite(instant)) return;
    const least = instant - until;
    const most = instant + resolution - from;
    const overlaps = least <= this.#most && most >= this.#least;
    this.#hasJumped = most === Infinity && (this.#hasJumped || !overlaps);
    this.#least = overlaps ? Math.max(least, this.#least) : least;
    this.#most = overlaps ? Math.min(most, this.#most) : most;
  }

  // The server's clock has reached `instant`: something of then has come here.
  heard(instant) {
    this.saw(instant, Infinity, 0, this.local());
  }

  #offset() {
    if (Number.isFinite(this.#least) && Number.isFinite(this.#most)) return (this.#least + this.#most) / 2;
    // A frame takes a moment to come here; the device's clock may be wrong by hours.
    if (this.#hasJumped) return this.#least;
    const device = Date.now() - this.local();
    return Math.min(Math.max(device, this.#least), this.#most);
  }
}
