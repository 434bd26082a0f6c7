/// Cuts a text that comes in parts before the first stop text in it; in UTF-8, whole characters.
package struct StopTexts: Sendable {
    private let stops: [[UInt8]]
    private var held: [UInt8] = []
    /// Whether a stop text has come, or the text has ended; what follows is ignored.
    package private(set) var isStopped = false
    /// The stop text that was found.
    package private(set) var found: String?

    /// - Parameter stops: none is empty.
    /// - Throws: `ApertusError`.
    package init(_ stops: [String]) throws {
        guard !stops.contains("") else {
            throw ApertusError(.usage, "a stop text must not be empty")
        }
        self.stops = stops.map { Array($0.utf8) }
    }

    /// Take more of the text; returns what is certain now.
    package mutating func push(_ text: some Sequence<UInt8>) -> [UInt8] {
        guard !isStopped else { return [] }
        held += text
        let found = stops.compactMap { stop -> (end: Int, start: Int)? in
            held.firstRange(of: stop).map { ($0.upperBound, $0.lowerBound) }
        }
        if let first = found.min(by: { $0 < $1 }) {
            isStopped = true
            self.found = String(decoding: held[first.start ..< first.end], as: UTF8.self)
            return Array(held[..<first.start])
        }
        let kept = stops.map { overlap($0) }.max() ?? 0
        let certain = Array(held.dropLast(kept))
        held.removeFirst(certain.count)
        return certain
    }

    /// Returns what was held back; no text follows.
    package mutating func finish() -> [UInt8] {
        guard !isStopped else { return [] }
        isStopped = true
        return held
    }

    /// The length of the longest end of what is held that begins `stop`.
    private func overlap(_ stop: [UInt8]) -> Int {
        let longest = min(held.count, stop.count - 1)
        return (0 ... longest).last { stop.starts(with: held.suffix($0)) } ?? 0
    }
}
