/// Reads each key of a JSON object by type and bounds, and keeps account of which keys were read.
///
/// Errors name the file, the key, what was expected and what was found.
package final class KeyReader {
    private let name: String
    private let values: [[UInt8]: JSON]
    private var read: Set<[UInt8]> = []

    /// - Parameter name: what error messages call the object.
    package init(_ object: JSON, _ name: String) {
        self.name = name
        let members = object.members ?? []
        values = Dictionary(members.map { ($0.key, $0.value) }, uniquingKeysWith: { $1 })
    }

    /// Whether the key has a value that is not null.
    package func has(_ key: String) -> Bool { value(key) != nil }

    /// The value of a key, which stays unread; nil where it is absent or null.
    package func value(_ key: String) -> JSON? {
        guard let found = values[Array(key.utf8)], !found.isNull else { return nil }
        return found
    }

    /// A required integer.
    package func integer(_ key: String, _ range: ClosedRange<Int>) throws -> Int {
        try required(key, optionalInteger(key, range))
    }

    /// An integer, or nil where the key is absent or null.
    package func optionalInteger(_ key: String, _ range: ClosedRange<Int>) throws -> Int? {
        guard let found = take(key) else { return nil }
        guard found.isInteger else { throw error(key, "an integer", found) }
        guard let integer = found.int, range.contains(integer) else {
            throw error(key, "an integer from \(range.lowerBound) to \(range.upperBound)", found)
        }
        return integer
    }

    /// A required finite number above `low`, at most `high`.
    package func number(_ key: String, above low: Double, to high: Double) throws -> Double {
        try required(key, optionalNumber(key, above: low, to: high))
    }

    /// A finite number above `low`, at most `high`; nil where the key is absent or null.
    package func optionalNumber(_ key: String, above low: Double, to high: Double) throws -> Double? {
        guard let found = take(key) else { return nil }
        guard case .number = found else { throw error(key, "a number", found) }
        guard let number = found.double, low < number, number <= high else {
            throw error(key, "a number above \(low) and up to \(high)", found)
        }
        return number
    }

    /// True or false, or nil where the key is absent or null.
    package func optionalFlag(_ key: String) throws -> Bool? {
        try typed(key, "true or false") { $0.flag }
    }

    /// A required text.
    package func text(_ key: String) throws -> String { try required(key, optionalText(key)) }

    /// A text, or nil where the key is absent or null.
    package func optionalText(_ key: String) throws -> String? {
        try typed(key, "a string") { $0.text }
    }

    /// A text under one of two keys, or the same under both; nil where it is empty.
    package func eitherText(_ key: String, _ older: String) throws -> String? {
        let new = try optionalText(key).flatMap { $0.isEmpty ? nil : $0 }
        let old = try optionalText(older).flatMap { $0.isEmpty ? nil : $0 }
        if let new, let old, new != old {
            throw ApertusError(
                .rejected, "\(name): \(key) \(quoted(new)) and \(older) \(quoted(old)) disagree")
        }
        return new ?? old
    }

    /// An object, or nil where the key is absent or null.
    package func object(_ key: String) throws -> JSON? {
        try typed(key, "an object or null") { $0.members == nil ? nil : $0 }
    }

    /// An integer or a list of integers; empty where the key is absent or null.
    package func integers(_ key: String, _ range: ClosedRange<Int>) throws -> [Int] {
        guard let found = take(key) else { return [] }
        return try (found.items ?? [found]).map { item in
            guard item.isInteger else { throw error(key, "an integer or a list of integers", found) }
            guard let id = item.int, range.contains(id) else {
                throw error(key, "ids from \(range.lowerBound) to \(range.upperBound)", found)
            }
            return id
        }
    }

    /// Mark keys that cannot change what the model computes.
    package func ignore(_ keys: some Sequence<String>) {
        for key in keys { read.insert(Array(key.utf8)) }
    }

    /// The keys that nothing has read, but for comments (`_...`) and those that are null.
    package var unread: [String] {
        values.filter { !read.contains($0.key) && !$0.value.isNull && $0.key.first != UInt8(ascii: "_") }
            .keys.sorted { $0.lexicographicallyPrecedes($1) }
            .map { String(decoding: $0, as: UTF8.self) }
    }

    /// Refuse the first keys that nothing has read: they may change the model's meaning.
    package func refuseUnread() throws {
        let unread = unread
        guard !unread.isEmpty else { return }
        let shown = unread.prefix(10).map { quoted($0.cut(60)) }.joined(separator: ", ")
        throw ApertusError(
            .rejected,
            "\(name): not an Apertus we implement: unknown key \(shown); "
                + "remove it only if it does not change what the model computes")
    }

    /// The error for a key whose value is not what is expected.
    package func error(_ key: String, _ expected: String, _ found: JSON) -> ApertusError {
        let text = found.shown
        let cut = text.unicodeScalars.count <= 60 ? text : text.cut(57) + "..."
        return ApertusError(.rejected, "\(name): \(key): expected \(expected), found \(cut)")
    }

    private func take(_ key: String) -> JSON? {
        read.insert(Array(key.utf8))
        return value(key)
    }

    private func typed<T>(_ key: String, _ expected: String, _ convert: (JSON) -> T?) throws -> T? {
        guard let found = take(key) else { return nil }
        guard let value = convert(found) else { throw error(key, expected, found) }
        return value
    }

    private func required<T>(_ key: String, _ value: T?) throws -> T {
        guard let value else {
            let state = values[Array(key.utf8)] == nil ? "missing" : "null"
            throw ApertusError(.rejected, "\(name): \(key): required, but \(state)")
        }
        return value
    }
}

/// A text between quotes, without what a terminal would obey.
package func quoted(_ text: String) -> String {
    let quote = text.contains("'") && !text.contains("\"") ? "\"" : "'"
    var out = quote
    for scalar in text.unicodeScalars {
        switch scalar {
        case "\\": out += "\\\\"
        case "\n": out += "\\n"
        case "\r": out += "\\r"
        case "\t": out += "\\t"
        case "'" where quote == "'": out += "\\'"
        case _ where scalar.value < 0x20 || (0x7F ... 0xA0).contains(scalar.value):
            let digits = String(scalar.value, radix: 16)
            out += "\\x" + (digits.count < 2 ? "0" : "") + digits
        case _ where scalar.properties.generalCategory == .format: out += "\\u{\(scalar.value)}"
        default: out.unicodeScalars.append(scalar)
        }
    }
    return out + quote
}

extension String {
    /// The first `count` characters of Unicode.
    func cut(_ count: Int) -> String { String(String.UnicodeScalarView(unicodeScalars.prefix(count))) }
}

extension JSON {
    /// Whether it is a number without fraction and exponent.
    var isInteger: Bool {
        guard case .number(let digits) = self else { return false }
        return !digits.utf8.contains { ".eE".utf8.contains($0) }
    }

    /// As error messages show it.
    var shown: String {
        switch self {
        case .object(let members):
            "{" + members.prefix(20).map { "\(JSON.string($0.key).shown): \($0.value.shown)" }
                .joined(separator: ", ") + "}"
        case .array(let items): "[" + items.prefix(20).map(\.shown).joined(separator: ", ") + "]"
        case .string(let bytes): quoted(String(decoding: bytes, as: UTF8.self))
        case .number(let digits): isInteger ? digits : Double(digits).map { "\($0)" } ?? digits
        case .bool(let flag): flag ? "True" : "False"
        case .null: "None"
        }
    }

    /// Whether both mean the same: numbers by value, true as 1, members in any order.
    func means(_ other: JSON) -> Bool {
        switch (self, other) {
        case (.object(let a), .object(let b)):
            guard a.count == b.count else { return false }
            let values = Dictionary(b.map { ($0.key, $0.value) }, uniquingKeysWith: { $1 })
            return a.allSatisfy { values[$0.key]?.means($0.value) ?? false }
        case (.array(let a), .array(let b)):
            return a.count == b.count && zip(a, b).allSatisfy { $0.means($1) }
        default:
            if let a = numeric, let b = other.numeric { return a == b }
            return self == other
        }
    }

    private var numeric: Double? {
        switch self {
        case .number(let digits): Double(digits)
        case .bool(let flag): flag ? 1 : 0
        default: nil
        }
    }
}
