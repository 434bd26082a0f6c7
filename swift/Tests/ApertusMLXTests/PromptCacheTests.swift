import ApertusCore
import Foundation
import MLX
import Testing

@testable import ApertusMLX

/// Files of `apertus-mlx generate --prompt-cache`, against those that Python has written of the same
/// prompts: `tests/swift_fixtures/prompt_caches.py`.
@Suite(.serialized) struct PromptCacheTests {
    private static let fixtures = ModelFixture.withForms

    private func cases(
        _ fixture: ModelFixture
    ) throws -> [(name: String, form: CacheForm, file: URL)] {
        try fixture.cases("forms").map { name, options in
            let form = try CacheForm(
                keyBits: options["key_bits"]?.int ?? 16, valueBits: options["value_bits"]?.int ?? 16,
                bound: options["bound"]?.int, sinks: options["sinks"]?.int ?? 4,
                window: options["window"]?.int ?? 64, rotates: options["rotate"]?.flag)
            return (name, form, fixture.beside.appendingPathComponent("\(name).cache.safetensors"))
        }
    }

    @Test(arguments: fixtures)
    func goesOnFromWhatPythonKept(fixture: ModelFixture) throws {
        let expected = try fixture.expected()
        let ids = fixture.ids(expected)
        let model = try ApertusModel(folder: fixture.folder, computeType: .float32)
        for (name, form, file) in try cases(fixture) {
            let prefix = try CachedPrefix(model: model, form: form)
            try PromptCacheFile(file, modelFolder: fixture.folder).restore(prefix)
            #expect(try prefix.tokens == ids.dropLast(), "\(name)")
            let tokens = ints(try #require(expected["float32.form.\(name).greedy"]))
            let run = try prefix.begin(ids, maxTokens: tokens.count)
            #expect(run.reused == ids.count - 1)
            #expect(try drain(run) == tokens, "\(name)")
        }
    }

    /// A file that holds what Python's holds, bit by bit, is one that Python opens.
    @Test(arguments: fixtures)
    func keepsWhatPythonKeeps(fixture: ModelFixture) throws {
        let ids = fixture.ids(try fixture.expected())
        let model = try ApertusModel(folder: fixture.folder, computeType: .float32)
        try withFolder { folder in
            for (name, form, file) in try cases(fixture) {
                let prefix = try CachedPrefix(model: model, form: form)
                try prefix.begin(ids, maxTokens: 1, prefillStep: 64).readPrefix()
                let own = folder.appendingPathComponent("\(name).safetensors")
                try PromptCacheFile(own, modelFolder: fixture.folder).save(prefix)
                let (found, about) = try loadArraysAndMetadata(url: own)
                let (wanted, wantedAbout) = try loadArraysAndMetadata(url: file)
                #expect(about == wantedAbout, "\(name)")
                #expect(Set(found.keys) == Set(wanted.keys), "\(name)")
                for (key, array) in wanted {
                    let other = try #require(found[key])
                    #expect(other.dtype == array.dtype && other.shape == array.shape, "\(name), \(key)")
                    if array.dtype.isFloatingPoint {
                        #expect(bits(other) == bits(array), "\(name), \(key)")
                    } else {
                        #expect(other.asArray(UInt32.self) == array.asArray(UInt32.self), "\(name), \(key)")
                    }
                }
            }
            let names = try FileManager.default.contentsOfDirectory(atPath: folder.path)
            #expect(names.allSatisfy { $0.hasSuffix(".safetensors") && !$0.hasPrefix(".") })
        }
    }

    /// Neither the end of the name nor a link matters; a link stays one, and what it leads to is new.
    @Test func aFileMayHaveAnyName() throws {
        let fixture = Self.fixtures[0]
        let ids = fixture.ids(try fixture.expected())
        let model = try ApertusModel(folder: fixture.folder, computeType: .float32)
        try withFolder { folder in
            let prefix = try CachedPrefix(model: model)
            try prefix.begin(ids, maxTokens: 1).readPrefix()
            let real = folder.appendingPathComponent("Zürich 1")
            let link = folder.appendingPathComponent("link")
            try Data("old".utf8).write(to: real)
            try FileManager.default.createSymbolicLink(at: link, withDestinationURL: real)
            let file = try PromptCacheFile(link, modelFolder: fixture.folder)
            try file.save(prefix)
            let other = try CachedPrefix(model: model)
            try file.restore(other)
            #expect(try other.tokens == prefix.tokens)
            #expect(try FileManager.default.contentsOfDirectory(atPath: folder.path).count == 2)
            let type = try FileManager.default.attributesOfItem(atPath: link.path)[.type]
            #expect(type as? FileAttributeType == .typeSymbolicLink)
        }
    }

    @Test func whatCannotBeWrittenIsSaid() throws {
        let fixture = Self.fixtures[0]
        let model = try ApertusModel(folder: fixture.folder, computeType: .float32)
        let prefix = try CachedPrefix(model: model)
        let nowhere = URL(fileURLWithPath: "/nowhere/to/be/found")
        let empty = #expect(throws: ApertusError.self) {
            try PromptCacheFile(nowhere, modelFolder: fixture.folder).save(prefix)
        }
        #expect(empty?.kind == .usage)
        try prefix.begin([1, 2, 3], maxTokens: 1).readPrefix()
        for url in [nowhere, fixture.folder] {
            let error = #expect(throws: ApertusError.self) {
                try PromptCacheFile(url, modelFolder: fixture.folder).save(prefix)
            }
            #expect(error?.kind == .resource)
            #expect(error?.description.contains(url.path) == true)
        }
    }

    /// Each refusal names the file and what is wrong, and leaves a prefix that holds nothing.
    @Test func otherConditionsAreRefused() throws {
        let (fixture, other) = (Self.fixtures[0], ModelFixture(name: "llama3-head-dim"))
        let file = fixture.beside.appendingPathComponent("codes-8.cache.safetensors")
        let form = try CacheForm(keyBits: 8)
        let model = try ApertusModel(folder: fixture.folder, computeType: .float32)
        func expectRefusal(
            _ words: String, of file: URL = file, _ model: ApertusModel = model,
            _ form: CacheForm = form, folder: URL = fixture.folder,
            kind: ApertusError.Kind = .rejected
        ) throws {
            let prefix = try CachedPrefix(model: model, form: form)
            let error = #expect(throws: ApertusError.self, "\(words)") {
                try PromptCacheFile(file, modelFolder: folder).restore(prefix)
            }
            #expect(error?.kind == kind)
            let said = error?.description ?? ""
            #expect(said.contains(file.lastPathComponent) && said.contains(words), "\(said)")
            #expect(!said.contains("\n"))
            #expect(try prefix.tokens == [])
        }
        try expectRefusal("another form", model, .full)
        try expectRefusal("another form", model, try CacheForm(keyBits: 8, sinks: 3))
        try expectRefusal(
            "another --compute", try ApertusModel(folder: fixture.folder, computeType: .bfloat16))
        let stranger = try ApertusModel(folder: other.folder, computeType: .float32)
        try expectRefusal("another model", stranger, folder: other.folder)
        try expectRefusal("no such prompt cache", of: URL(fileURLWithPath: "/no/cache"), kind: .notFound)
        try expectRefusal(
            "is not a prompt cache", of: fixture.folder.appendingPathComponent("model.safetensors"))

        let copy = try FolderCopy(fixture)
        try Data("{{ x }}".utf8).write(to: copy.url.appendingPathComponent("chat_template.jinja"))
        try expectRefusal("another tokenizer or chat template", folder: copy.url)
        let second = try FolderCopy(fixture)
        try second.changeTensors { $0["model.norm.weight"] = $0["model.norm.weight"]! * Float(2) }
        try expectRefusal("another revision of the weights", folder: second.url)

        let (arrays, about) = try loadArraysAndMetadata(url: file)
        let recent = "layers.0.recent"
        try withFolder { folder in
            let changed = folder.appendingPathComponent("changed.safetensors")
            func write(_ change: (inout [String: MLXArray], inout [String: String]) -> Void) throws {
                var (some, texts) = (arrays, about)
                change(&some, &texts)
                eval(Array(some.values))
                try save(arrays: some, metadata: texts, url: changed)
            }
            for (key, value, words) in [
                ("format", "other", "is not a prompt cache"), ("format_version", "2", "version '2'"),
                ("quantization", "0", "another quantization"), ("tokens", "0", "tokens do not match"),
                ("positions", "-1", "positions '-1'"), ("positions", "100", "shape"),
                ("positions", "99999999999999999999", "positions '999"), ("positions", "", "positions"),
                ("positions", "\u{663}", "positions"), ("form", "{}", "another form"),
            ] {
                try write { $1[key] = value }
                try expectRefusal(words, of: changed)
            }
            try write { some, _ in some[recent] = nil }
            try expectRefusal("layers.0.recent is missing", of: changed)
            try write { some, _ in some["more"] = MLXArray([1, 2]) }
            try expectRefusal("unexpected array 'more'", of: changed)
            try write { some, _ in some[recent] = some[recent]![0..., 0..., 1..., 0...] }
            try expectRefusal("layers.0.recent: shape", of: changed)
            try write { some, _ in some[recent] = some[recent]!.asType(.float16) }
            try expectRefusal("layers.0.recent: type F16, expected F32", of: changed)
            try write { some, _ in some[recent] = some[recent]! * Float.nan }
            try expectRefusal("not finite", of: changed)
            try write { some, _ in some["tokens"] = some["tokens"]! - MLXArray(1) }
            try expectRefusal("tokens do not match", of: changed)
            try write { some, _ in some["tokens"] = MLXArray(Array(repeating: -1, count: 149)) }
            try expectRefusal("tokens do not match", of: changed)
        }
    }

    /// Cut at any place, or with other bytes in its header, a file is refused or says the same.
    @Test func damageIsOneErrorThatNamesTheFile() throws {
        let fixture = Self.fixtures[0]
        let form = try CacheForm(keyBits: 8)
        let whole = try Data(
            contentsOf: fixture.beside.appendingPathComponent("codes-8.cache.safetensors"))
        let model = try ApertusModel(folder: fixture.folder, computeType: .float32)
        let header = 8 + Int(whole[0]) + Int(whole[1]) << 8
        try withFolder { folder in
            let url = folder.appendingPathComponent("damaged")
            let file = try PromptCacheFile(url, modelFolder: fixture.folder)
            let prefix = try CachedPrefix(model: model, form: form)
            func expectRefusal(_ data: Data, isSure: Bool = true) throws {
                try data.write(to: url)
                do {
                    try file.restore(prefix)
                    #expect(!isSure)
                } catch let error as ApertusError {
                    #expect(error.kind == .rejected && error.description.contains(url.path), "\(error)")
                }
            }
            for end in [0, 1, 7, 8, 9, 100, header - 1, header, header + 1, whole.count - 1] {
                try expectRefusal(whole.prefix(end))
            }
            try expectRefusal(whole + [0])
            try expectRefusal(Data("Dear sir or madam, this is no prompt cache".utf8))
            for place in stride(from: 0, to: header, by: 37) {
                var data = whole
                data[place] ^= 0x11
                // A character of a key that is not looked at may change.
                try expectRefusal(data, isSure: false)
            }
        }
    }

    private func withFolder(_ body: (URL) throws -> Void) throws {
        let folder = FileManager.default.temporaryDirectory
            .appendingPathComponent("apertus-\(UUID().uuidString)")
        try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
        defer { try? FileManager.default.removeItem(at: folder) }
        try body(folder)
    }
}
