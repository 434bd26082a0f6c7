/// A part of a conversation that two control tokens enclose; the value is the id of the first.
///
/// The ids are those of Apertus v1, v1.1 and 1.5. The names of the tokens differ, the ids do not:
/// 61 is `<|system_start|>` in v1 and `<SPECIAL_61>` in v1.1. No other file knows these numbers.
package enum Role: Int32, CaseIterable, Sendable {
    case system = 61
    case developer = 63
    case user = 65
    case assistant = 67
    case inner = 69
    case tools = 71

    /// The id that opens it.
    package var start: Int32 { rawValue }
    /// The id that closes it.
    package var end: Int32 { rawValue + 1 }
    /// What the tokens are called where they have names of their own.
    fileprivate var names: [(name: String, id: Int32)] {
        let sides = self == .inner || self == .tools ? ("prefix", "suffix") : ("start", "end")
        return [("<|\(self)_\(sides.0)|>", start), ("<|\(self)_\(sides.1)|>", end)]
    }
}

/// What the control tokens of one vocabulary mean in an answer.
package struct Roles: Equatable, Sendable {
    /// Ids that open a deliberation.
    package let thoughtStarts: Set<Int32>
    /// Ids that close it.
    package let thoughtEnds: Set<Int32>

    private static let known =
        "Apertus v1, v1.1 and 1.5 (Apertus 2 moves them and is not supported)"
    private static let controlIDs = Role.system.start ... Role.tools.end
    private static let turnIDs = Role.system.start ... Role.assistant.end
    // Apertus 1.5 writes thoughts between ids that v1 has no use for.
    private static let secondInner: (start: Int32, end: Int32) = (32, 33)
    private static let innerNames = [
        ["<think>", "</think>"], ["<|inner_prefix|>", "<|inner_suffix|>"],
    ]

    /// - Throws: `ApertusError` if control tokens are not where Apertus v1, v1.1 and 1.5 have them.
    package init(_ tokenizer: Tokenizer) throws {
        let special = tokenizer.specialIDs
        func name(_ id: Int32) -> String {
            String(decoding: tokenizer.bytes(of: id), as: UTF8.self)
        }
        if let missing = Self.controlIDs.first(where: { !special.contains($0) }) {
            throw ApertusError(
                .rejected,
                "tokenizer.json: id \(missing) is not a special token; ids 61 to 72 are the "
                    + "control tokens of \(Self.known)")
        }
        let second = [Self.secondInner.start, Self.secondInner.end]
        let hasSecond =
            special.isSuperset(of: second) && Self.innerNames.contains(second.map { name($0) })
        let names = Role.allCases.flatMap(\.names)
        let places = Dictionary(uniqueKeysWithValues: names.map { (Array($0.name.utf8), $0.id) })
        for id in special.sorted() {
            guard let place = places[Array(tokenizer.bytes(of: id))], place != id,
                !(hasSecond && second.contains(id))
            else { continue }
            throw ApertusError(
                .rejected,
                "tokenizer.json: \(name(id)) has id \(id) and not \(place), as in \(Self.known)")
        }
        thoughtStarts = Set([Role.inner.start] + (hasSecond ? [Self.secondInner.start] : []))
        thoughtEnds = Set([Role.inner.end] + (hasSecond ? [Self.secondInner.end] : []))
    }

    /// Whether a prompt ends within a deliberation of the turn that is to be continued.
    package func leavesThoughtOpen(_ prompt: [Int32]) -> Bool {
        for id in prompt.reversed() {
            if thoughtStarts.contains(id) { return true }
            if thoughtEnds.contains(id) || Self.turnIDs.contains(id) { return false }
        }
        return false
    }
}
