import MLX

/// Growing memory for rows along the positions' axis: without end, or as a ring.
///
/// A store holds several arrays `[B, heads, S, width]` that grow together. What is expected gets
/// room at once; beyond that, room is added in steps of an eighth (at least 256 rows).
class Store {
    fileprivate(set) var arrays: [MLXArray] = []
    fileprivate(set) var length = 0
    /// Rows in all that are known to come; room for them is made with the first.
    var expected = 0

    /// Number of rows held.
    var held: Int { length }
    /// Number of rows allocated.
    var room: Int { arrays.first?.dim(2) ?? 0 }

    /// Rows allocated once `rows` have come.
    func capacity(_ rows: Int) -> Int { Self.capacity(for: rows) }

    /// A multiple of 256, or of an eighth of a power of two.
    static func capacity(for rows: Int) -> Int {
        let bits = Int.bitWidth - rows.leadingZeroBitCount
        let step = max(256, 1 << max(0, bits - 4))
        return (rows + step - 1) / step * step
    }

    /// Write rows behind the others; returns all that are to be read, of each array.
    ///
    /// - Parameter keepEvicted: also those that these rows push out, for queries that see them.
    func append(_ new: [MLXArray], keepEvicted: Bool = false) -> [MLXArray] {
        let start = length
        length += new[0].dim(2)
        reserve(length, like: new)
        for (array, rows) in zip(arrays, new) { array[.ellipsis, start ..< length, 0...] = rows }
        return rows()
    }

    /// All rows held, of each array; no array while there are none.
    func rows() -> [MLXArray] {
        held == 0 ? [] : arrays.map { $0[.ellipsis, 0 ..< held, 0...] }
    }

    /// Which rows, counting all that ever came, `append` of `new` rows returns.
    func numbers(_ new: Int) -> [Int] { Array(0 ..< length + new) }

    private func reserve(_ rows: Int, like new: [MLXArray]) {
        let wanted = capacity(max(rows, expected))
        guard wanted > room else { return }
        let blank = new.map { array in
            MLXArray.zeros(
                [array.dim(0), array.dim(1), wanted - room, array.dim(3)], dtype: array.dtype)
        }
        arrays = arrays.isEmpty
            ? blank : zip(arrays, blank).map { concatenated([$0, $1], axis: 2) }
    }

    /// Take over what `rows()` of an equal store gave when it had `length`.
    func restore(_ rows: [MLXArray], length: Int) {
        (arrays, self.length) = ([], 0)
        if let first = rows.first, first.dim(2) > 0 { _ = append(rows) }
        self.length = length
    }

    /// Whether what was held with `length` rows is still there.
    func canShrink(_ length: Int) -> Bool { length <= self.length }

    /// Go back to `length` rows.
    func shrink(_ length: Int) { self.length = length }
}

/// Keeps the first `kept` rows and the latest of the others, `size` in all.
final class Ring: Store {
    let size: Int
    let kept: Int

    init(size: Int, kept: Int = 0) { (self.size, self.kept) = (size, kept) }

    override var held: Int { min(length, size) }
    override func capacity(_ rows: Int) -> Int { min(Self.capacity(for: rows), size) }

    /// As `Store` does; rows come back in the order of their places in the ring.
    override func append(_ new: [MLXArray], keepEvicted: Bool = false) -> [MLXArray] {
        let count = new[0].dim(2)
        if length + count <= size { return super.append(new) }
        let place = place(of: length)
        if place + count <= room, !keepEvicted {
            length += count
            for (array, rows) in zip(arrays, new) {
                array[.ellipsis, place ..< place + count, 0...] = rows
            }
            return rows()
        }
        let together = length == 0
            ? new : zip(rows(), new).map { concatenated([$0, $1], axis: 2) }
        let chosen = MLXArray(survivors(count))
        length += count
        arrays = together.map { $0.take(chosen, axis: 2) }
        return keepEvicted ? together : rows()
    }

    override func numbers(_ new: Int) -> [Int] {
        numbersHeld(length) + Array(length ..< length + new)
    }

    /// Only rows that nothing has overwritten can come back.
    override func canShrink(_ length: Int) -> Bool {
        length == self.length || (length <= self.length && self.length <= size)
    }

    private func place(of number: Int) -> Int {
        number < size ? number : kept + (number - kept) % (size - kept)
    }

    /// The row in each place once `length` rows have come.
    private func numbersHeld(_ length: Int) -> [Int] {
        guard length > size else { return Array(0 ..< length) }
        let last = length - 1
        return Array(0 ..< kept) + (kept ..< size).map { last - (last - $0) % (size - kept) }
    }

    /// For each place, which of the held and `count` new rows, in this order, will be there.
    private func survivors(_ count: Int) -> [Int] {
        // A row that stays is in its place already.
        numbersHeld(length + count).enumerated().map { place, number in
            number < length ? place : number + held - length
        }
    }
}
