/// Byte-pair encoding (Sennrich et al., arXiv 1508.07909) of one piece: the lowest rank first, then the
/// leftmost. Takes n log n steps for n bytes.
struct BytePairs {
    private struct Candidate: Comparable {
        let rank: UInt32
        let at: Int
        let left, right, result: Int32

        static func < (a: Self, b: Self) -> Bool { (a.rank, a.at) < (b.rank, b.at) }
    }

    private let table: TokenTable
    private var ids: [Int32]
    /// Indices of the neighbours in `ids`; -1 and `ids.count` beyond the ends.
    private var before, after: [Int]
    private var heap: [Candidate] = []

    /// The ids of a piece whose bytes have these ids.
    static func merge(_ ids: [Int32], by table: TokenTable) -> [Int32] {
        var pairs = BytePairs(table, ids)
        return pairs.merged()
    }

    private init(_ table: TokenTable, _ ids: [Int32]) {
        self.table = table
        self.ids = ids
        before = Array(-1 ..< ids.count - 1)
        after = Array(1 ..< ids.count + 1)
        for at in ids.indices.dropLast() { consider(at) }
    }

    private mutating func merged() -> [Int32] {
        let gone: Int32 = -1
        while let best = removeLowest() {
            let right = after[best.at]
            // One of the two has been merged into another since.
            guard ids[best.at] == best.left, right < ids.count, ids[right] == best.right else { continue }
            ids[best.at] = best.result
            ids[right] = gone
            after[best.at] = after[right]
            if after[right] < ids.count { before[after[right]] = best.at }
            if before[best.at] >= 0 { consider(before[best.at]) }
            consider(best.at)
        }
        return ids.filter { $0 != gone }
    }

    private mutating func consider(_ at: Int) {
        let right = after[at]
        guard right < ids.count, let rule = table.merge(ids[at], ids[right]) else { return }
        insert(Candidate(rank: rule.rank, at: at, left: ids[at], right: ids[right], result: rule.id))
    }

    private mutating func insert(_ candidate: Candidate) {
        heap.append(candidate)
        var at = heap.count - 1
        while at > 0, heap[at] < heap[(at - 1) / 2] {
            heap.swapAt(at, (at - 1) / 2)
            at = (at - 1) / 2
        }
    }

    private mutating func removeLowest() -> Candidate? {
        guard let lowest = heap.first else { return nil }
        let last = heap.removeLast()
        guard !heap.isEmpty else { return lowest }
        heap[0] = last
        var at = 0
        while true {
            let children = (2 * at + 1 ..< 2 * at + 3).prefix { $0 < heap.count }
            guard let child = children.min(by: { heap[$0] < heap[$1] }), heap[child] < heap[at] else {
                return lowest
            }
            heap.swapAt(at, child)
            at = child
        }
    }
}
