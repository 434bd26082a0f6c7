import Foundation
import Testing

@testable import ApertusCore

/// Damaged folders, a thousand at night: each loads or gives an `ApertusError`; none ends the process.
@Suite struct MutatedFolderTests {
    @Test func everyDamagedFolderLoadsOrSaysWhatIsWrong() throws {
        var random = Mixed64(state: 20_261_127)
        var counts: [Mutation: (loaded: Int, refused: Int)] = [:]
        let bases = ["converted-4", "converted-mixed", "tied-equal-head", "demo"]
        let count = sized(1000, 130)
        for number in 0 ..< count {
            let kind = Mutation.allCases[number % Mutation.allCases.count]
            let base = try Fixtures.folder.appendingPathComponent(
                "checkpoints/\(bases[Int.random(in: 0 ..< bases.count, using: &random)])")
            let folder = FileManager.default.temporaryDirectory
                .appendingPathComponent("apertus-mutated-\(UUID().uuidString)")
            defer { try? FileManager.default.removeItem(at: folder) }
            try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
            for name in try ModelFile.names(in: base) {
                try FileManager.default.linkItem(
                    at: base.appendingPathComponent(name), to: folder.appendingPathComponent(name))
            }
            let what = try kind.apply(to: folder, &random)
            do {
                try load(folder, hashing: number % 40 == 0)
                counts[kind, default: (0, 0)].loaded += 1
            } catch let error as ApertusError {
                counts[kind, default: (0, 0)].refused += 1
                #expect(error.kind != .bug && !error.description.contains("\n"), "\(what): \(error)")
            } catch {
                Issue.record("\(what): \(error) is no ApertusError")
            }
        }
        for kind in Mutation.allCases {
            let found = counts[kind] ?? (0, 0)
            print("mutated folders, \(kind): \(found.loaded) load, \(found.refused) refused")
            #expect(found.loaded + found.refused >= count / 14)
        }
        #expect(counts.values.reduce(0) { $0 + $1.refused } > count * 4 / 10)
    }

    /// All that is read of a folder before its arrays.
    private func load(_ folder: URL, hashing: Bool) throws {
        let manifest = try Manifest(folder: folder)
        if hashing { _ = try manifest?.verify(folder) }
        let checkpoint = try Checkpoint(folder: folder)
        let config = checkpoint.config
        _ = try GenerationConfig(folder: folder, vocabSize: config.vocabSize)
        let prompts = try GoldenPrompts(folder: folder)
        _ = try GoldenAnswers(folder: folder)
        let tokenizer = try Tokenizer(folder: folder)
        _ = prompts?.differing(tokenizer)
        let ids = tokenizer.encode("Grüezi! <|assistant_end|> 3,50 €")
        _ = tokenizer.decode(ids + [-1, Int32(config.vocabSize), .max])
        _ = config.wavelengths
        _ = Layout.parameterCount(config)
        let planner = MemoryPlanner(config, manifest?.memory ?? MemoryTerms(checkpoint))
        for limit in [1, 1 << 20, 1 << 40] {
            _ = try? planner.plan(limitBytes: limit, context: config.maxPositions, bounds: true)
        }
        try manifest?.check(config)
        try manifest?.checkSizes(folder)
    }
}

/// Kinds of damage.
enum Mutation: CaseIterable {
    case truncated, flipped, header, value, hugeNumber, key, removedText, deleted, renamed, exchanged,
        linked, special, appended

    /// Damage one file of `folder`, whose files are links to the only copy; returns what was done.
    func apply(to folder: URL, _ random: inout Mixed64) throws -> String {
        let names = try ModelFile.names(in: folder).filter { !$0.hasSuffix(".md") }
        let texts = names.filter { $0.hasSuffix(".json") }
        let weights = names.filter { $0.hasSuffix(".safetensors") }
        let pool: [String] =
            switch self {
            case .value, .hugeNumber, .key, .removedText: texts
            case .header: weights
            default: names
            }
        let name = pool[Int.random(in: 0 ..< pool.count, using: &random)]
        let url = folder.appendingPathComponent(name)
        var data = try Data(contentsOf: url)
        try FileManager.default.removeItem(at: url)
        func below(_ count: Int) -> Int { count > 0 ? Int.random(in: 0 ..< count, using: &random) : 0 }
        switch self {
        case .truncated: data = data.prefix(below(data.count))
        case .flipped:
            // Half of them where a header or a first key is.
            for _ in 0 ... below(8) {
                let at = below(Bool.random(using: &random) ? min(data.count, 2000) : data.count)
                if !data.isEmpty { data[at] ^= UInt8(1 << below(8)) }
            }
        case .header:
            let length = data.prefix(8).reversed().reduce(0) { $0 << 8 | Int($1) }
            let changed = Self.exchangeToken(data[8 ..< 8 + length], Self.numbers, numbersOnly: true, &random)
            let size = (0 ..< 8).map { UInt8(truncatingIfNeeded: changed.count >> ($0 * 8)) }
            data = Data(size) + changed + data[(8 + length)...]
        case .value: data = Self.exchangeToken(data, Self.values, numbersOnly: false, &random)
        case .hugeNumber: data = Self.exchangeToken(data, Self.numbers, numbersOnly: true, &random)
        case .key:
            let keys = ["\"x\"", "\"\"", "\"é\"", "\"size_bytes\""]
            data = Self.exchangeToken(data, keys, numbersOnly: false, &random)
        case .removedText:
            let start = below(data.count)
            data.removeSubrange(start ..< min(data.count, start + 1 + below(40)))
        case .appended: data.append(contentsOf: (0 ... below(20)).map { _ in UInt8(below(256)) })
        case .deleted: return "\(self) \(name)"
        case .renamed:
            let others = [
                "model.safetensors", "config.json", "x.safetensors", "model-2.safetensors", "a.bin",
            ]
            let other = folder.appendingPathComponent(others[below(others.count)])
            // Not through a link into the fixture.
            try? FileManager.default.removeItem(at: other)
            try data.write(to: other)
            return "\(self) \(name)"
        case .exchanged:
            let others = names.filter { $0 != name }
            data = try Data(contentsOf: folder.appendingPathComponent(others[below(others.count)]))
        case .linked:
            let targets = ["/etc/passwd", "nowhere", name, ".", "..", "/dev/zero", "config.json"]
            try FileManager.default.createSymbolicLink(
                atPath: url.filePath, withDestinationPath: targets[below(targets.count)])
            return "\(self) \(name)"
        case .special:
            if Bool.random(using: &random) {
                mkfifo(url.filePath, 0o600)
            } else {
                try FileManager.default.createDirectory(at: url, withIntermediateDirectories: true)
            }
            return "\(self) \(name)"
        }
        try data.write(to: url)
        return "\(self) \(name)"
    }

    static let numbers = [
        "-1", "0", "1", "2147483648", "9223372036854775807", "-9223372036854775808",
        "18446744073709551616", "99999999999999999999999999", "1e308", "1e999", "0.5", "1e-400",
    ]
    static let values =
        numbers + [
            "null", "true", "\"x\"", "[]", "{}", "[[1]]", "{\"bits\": 4}", "\"\\ud800\"",
        ]

    /// Write something else in place of one number, word or text of JSON.
    private static func exchangeToken(
        _ data: Data, _ others: [String], numbersOnly: Bool, _ random: inout Mixed64
    ) -> Data {
        let bytes = Array(data)
        var tokens: [Range<Int>] = []
        var at = 0
        while at < bytes.count {
            let start = at
            if bytes[at] == UInt8(ascii: "\"") {
                at += 1
                while at < bytes.count, bytes[at] != UInt8(ascii: "\"") {
                    at += bytes[at] == UInt8(ascii: "\\") ? 2 : 1
                }
                at = min(at + 1, bytes.count)
                if !numbersOnly { tokens.append(start ..< at) }
            } else if "-0123456789truefalsn".utf8.contains(bytes[at]) {
                let word = "-+.0123456789abcdefghijklmnopqrstuvwxyzE".utf8
                while at < bytes.count, word.contains(bytes[at]) { at += 1 }
                if !numbersOnly || bytes[start] < 0x3A { tokens.append(start ..< at) }
            } else {
                at += 1
            }
        }
        guard let token = tokens.randomElement(using: &random),
            let other = others.randomElement(using: &random)
        else { return data }
        return Data(bytes[..<token.lowerBound] + Array(other.utf8) + bytes[token.upperBound...])
    }
}

/// SplitMix64: the same numbers in every run.
struct Mixed64: RandomNumberGenerator {
    var state: UInt64

    mutating func next() -> UInt64 {
        state &+= 0x9E37_79B9_7F4A_7C15
        var z = state
        z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
        z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
        return z ^ (z >> 31)
    }
}
