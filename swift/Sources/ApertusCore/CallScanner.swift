/// Reads the JSON of a block of tool calls as it comes: `[{"NAME": {ARGUMENTS}}, ...]`.
///
/// A call is an object with one key, the tool's name, whose value is an object, null for none, or a
/// string with the text of an object. A block is a list of calls, or one call alone. Each byte is
/// looked at once, and checked again when its call is whole; until then the last brace of the
/// arguments is held back.
struct CallScanner: Sendable {
    static let mostBytes = 1 << 20

    /// The block is malformed; nothing more is read.
    private(set) var hasFailed = false
    /// Then, all text since the last whole call.
    private(set) var rest: [UInt8] = []
    /// Of the next call.
    private(set) var index: Int

    private enum Expected {
        case block, firstCall, call, key, name, colon, value, object, string, null, callEnd, comma
        case nothing
    }

    private let first: Int
    private let newID: @Sendable () -> String
    private let names: Set<[UInt8]>?
    private var expected = Expected.block
    private var isList = false
    private var count = 0
    private var unsettled: [UInt8] = []
    // Of the call that is being read.
    private var name: [UInt8] = []
    private var isOpen = false
    private var object: JSONObjectEnd?
    private var string = JSONStringEnd()
    private var value: [UInt8] = []
    private var null: [UInt8] = []

    /// - Parameters:
    ///   - index: of its first call.
    ///   - names: the block has to be a list of calls with these names; nil for any names, and a
    ///     call alone.
    init(index: Int, newID: @escaping @Sendable () -> String, names: Set<[UInt8]>? = nil) {
        self.index = index
        first = index
        self.newID = newID
        self.names = names
    }

    /// Whether all that was opened is closed, and there is at least one call.
    var isWhole: Bool { expected == .nothing && index > first }

    /// Read on; returns what is certain of the calls now.
    mutating func feed(_ text: [UInt8]) -> [CallPart] {
        var parts: [CallPart] = []
        count += text.count
        if count > Self.mostBytes { fail(&parts) }
        var at = 0
        var settled = 0
        while at < text.count, !hasFailed {
            at = read(text, at, &settled, &parts)
        }
        unsettled += text[settled...]
        if hasFailed { rest = unsettled }
        return parts
    }

    /// End the block; if it was cut, its last call ends as far as it has come.
    mutating func finish(isCut: Bool) -> [CallPart] {
        var parts: [CallPart] = []
        if isCut {
            cut(&parts)
        } else if expected != .block, expected != .nothing {
            fail(&parts)
        }
        if hasFailed { rest = unsettled }
        return parts
    }

    /// Read one thing; returns where it ends.
    private mutating func read(
        _ text: [UInt8], _ start: Int, _ settled: inout Int, _ parts: inout [CallPart]
    ) -> Int {
        switch expected {
        case .name: return readName(text, start, &parts)
        case .object: return readObject(text, start, &parts)
        case .string:
            let end = string.read(text, start)
            if string.isClosed { expected = .callEnd }
            return end
        case .null:
            null.append(text[start])
            if !"null".utf8.starts(with: null) {
                fail(&parts)
            } else if null.count == 4 {
                expected = .callEnd
            }
            return start + 1
        default:
            let next = text[start...].firstIndex { !isBlank($0) } ?? text.count
            return next < text.count ? step(text[next], next, &settled, &parts) : next
        }
    }

    /// What is expected after a byte between names and values, nil if it must not come.
    private static func following(_ byte: UInt8, _ expected: Expected) -> Expected? {
        switch (expected, byte) {
        case (.block, UInt8(ascii: "[")): .firstCall
        case (.block, UInt8(ascii: "{")), (.firstCall, UInt8(ascii: "{")),
            (.call, UInt8(ascii: "{")):
            .key
        case (.firstCall, UInt8(ascii: "]")), (.comma, UInt8(ascii: "]")): .nothing
        case (.key, UInt8(ascii: "\"")): .name
        case (.key, UInt8(ascii: "}")), (.callEnd, UInt8(ascii: "}")): .comma
        case (.colon, UInt8(ascii: ":")): .value
        case (.value, UInt8(ascii: "{")): .object
        case (.value, UInt8(ascii: "\"")): .string
        case (.value, UInt8(ascii: "n")): .null
        case (.comma, UInt8(ascii: ",")): .call
        default: nil
        }
    }

    /// Read a byte between names and values; returns where it ends.
    private mutating func step(
        _ byte: UInt8, _ start: Int, _ settled: inout Int, _ parts: inout [CallPart]
    ) -> Int {
        let before = expected
        guard let following = Self.following(byte, before),
            !(following == .key && before == .block && names != nil)
        else {
            fail(&parts)
            return start
        }
        expected = following
        if before == .block {
            isList = following == .firstCall
        } else if following == .name {
            begin([])
        } else if following == .object {
            object = JSONObjectEnd()
            open(&parts)
        } else if before == .callEnd {
            close(&parts)
        }
        if following == .comma, !isList { expected = .nothing }
        if following == .comma || following == .nothing, !hasFailed {
            unsettled = []
            settled = start + 1
        }
        // An object and null begin with the byte that tells them.
        return following == .object || following == .null ? start : start + 1
    }

    private mutating func begin(_ name: [UInt8]) {
        self.name = name
        isOpen = false
        object = nil
        string = JSONStringEnd()
        value = []
        null = []
    }

    private mutating func readName(_ text: [UInt8], _ start: Int, _ parts: inout [CallPart]) -> Int
    {
        let end = string.read(text, start)
        guard string.isClosed else { return end }
        begin(string.value() ?? [])
        expected = .colon
        // A later prompt could not say another name.
        if !isCalledName(name) || names?.contains(name) == false { fail(&parts) }
        return end
    }

    private mutating func readObject(_ text: [UInt8], _ start: Int, _ parts: inout [CallPart])
        -> Int
    {
        let end = object!.read(text, start)
        value += text[start ..< end]
        let isClosed = object!.isClosed
        if object!.isWrong {
            fail(&parts)
        } else {
            let certain = text[start ..< (isClosed ? end - 1 : end)]
            if !certain.isEmpty { parts.append(part(certain)) }
        }
        if isClosed { expected = .callEnd }
        return end
    }

    private mutating func open(_ parts: inout [CallPart]) {
        isOpen = true
        let text = String(decoding: name, as: UTF8.self)
        parts.append(CallPart(index: index, id: newID(), name: text))
    }

    private func part(_ arguments: some Collection<UInt8>) -> CallPart {
        CallPart(index: index, arguments: String(decoding: arguments, as: UTF8.self))
    }

    /// End a call whose value is whole, if it is valid.
    private mutating func close(_ parts: inout [CallPart]) {
        var last: [UInt8]?
        if object != nil {
            last = isJSONObject(value) ? Array("}".utf8) : nil
        } else if !null.isEmpty {
            last = Array("{}".utf8)
        } else {
            last = string.value().flatMap { isJSONObject($0) ? $0 : nil }
        }
        guard let last else {
            fail(&parts)
            return
        }
        if !isOpen { open(&parts) }
        parts.append(part(last))
        index += 1
        begin([])
    }

    /// End a call in the middle; without a whole name there is none.
    private mutating func cut(_ parts: inout [CallPart]) {
        switch expected {
        case .callEnd: close(&parts)
        case .string:
            guard let text = string.value(),
                text.first(where: { !isBlank($0) }).map({ $0 == UInt8(ascii: "{") }) ?? true
            else {
                fail(&parts)
                return
            }
            open(&parts)
            if !text.isEmpty { parts.append(part(text)) }
        case .colon, .value, .null: open(&parts)
        default: break
        }
    }

    private mutating func fail(_ parts: inout [CallPart]) {
        hasFailed = true
        guard isOpen else { return }
        parts.append(CallPart(index: index, isWithdrawn: true))
        index += 1
        isOpen = false
    }
}
